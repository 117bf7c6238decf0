"""Records in JSON lines -> shuffled binary datasets, also where they are larger than memory."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

from cpm_bee import records
from cpm_bee.data.container import LENGTH, BinaryDataset, DatasetWriter, encode, payload_limit
from cpm_bee.data.meta import META
from cpm_bee.errors import InputError, Problems
from cpm_bee.files import atomic_folder
from cpm_bee.progress import progress

BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 256  # all are open at once; systems allow as few as 1024 open files


def preprocess(
    inputs: Path,
    output_path: Path,
    output_name: str,
    *,
    seed: int,
    overwrite: bool,
    block_size: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[BinaryDataset]:
    """Make a dataset `output_path/STEM` of each file `STEM.jsonl`; all of them or none.

    The records are shuffled: spread at random over buckets on disk, then each bucket in memory.
    Equal input, seed, block and bucket size give equal bytes.

    Args:
        inputs: a folder with *.jsonl files, or one file of records.
        output_path: folder of the datasets, made if missing.
        output_name: name of the data file in each dataset.
        overwrite: replace datasets that exist.
        block_size: bytes of a block (SPEC §9).
        bucket_bytes: about what one bucket holds, the memory needed.

    Raises:
        InputError: with all problems of all files; a dataset that exists and no `overwrite`.
            Nothing is left behind.
    """
    if Path(output_name).name != output_name or output_name in ("", META) or output_name[0] == ".":
        raise InputError(
            f"--output_name {output_name!r}: expected a file name other than {META} that does not "
            "begin with a point"
        )
    files = _input_files(inputs)
    folders = [output_path / file.stem for file in files]
    _check_destinations(output_path, folders, overwrite)
    problems = Problems()
    with contextlib.ExitStack() as datasets:
        parts = [datasets.enter_context(atomic_folder(f, replace=overwrite)) for f in folders]
        rngs = [random.Random(seed) for _ in files]
        buckets = [
            _spread(file, part, rng, payload_limit(block_size), bucket_bytes, problems)
            for file, part, rng in zip(files, parts, rngs, strict=True)
        ]
        problems.raise_if_any(
            f"{inputs}: {problems.count} problems, nothing was written", _record_help()
        )
        for file, part, rng, paths in zip(files, parts, rngs, buckets, strict=True):
            with DatasetWriter(part, output_name, block_size) as writer:
                for path in progress(paths, description=f"writing {file.stem}", unit="buckets"):
                    _append_shuffled(path, rng, writer)
    return [BinaryDataset(folder) for folder in folders]


def _input_files(inputs: Path) -> list[Path]:
    if inputs.is_file():
        return [inputs]
    reformat = "python data_reformat.py (in tutorials/basic_task_finetune) makes them of raw_data"
    if not inputs.is_dir():
        raise InputError(
            f"{inputs}: no such file or folder; expected *.jsonl files of records\n{reformat}"
        )
    # Hidden names are what editors and other systems leave beside a file.
    files = [p for p in inputs.glob("*.jsonl") if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise InputError(f"{inputs}: looked for *.jsonl files of records, found none\n{reformat}")
    return sorted(files)


def _check_destinations(output_path: Path, folders: list[Path], overwrite: bool) -> None:
    if output_path.exists() and not output_path.is_dir():
        raise InputError(f"{output_path}: --output_path is a folder, this is a file")
    existing = [folder for folder in folders if folder.exists()]
    if existing and not overwrite:
        raise InputError(
            f"ValueError: Dataset name exists: {', '.join(map(str, existing))}\n"
            "replace it with --overwrite, or give another --output_path or another name to the "
            "input file"
        )
    for folder in existing:
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / META).is_file()):
            raise InputError(f"{folder}: this is no dataset, so --overwrite does not replace it")


def _record_help() -> str:
    return 'a record is one line: {"input": "...", "<ans>": "..."}, a literal < written <<'


def _spread(
    file: Path, folder: Path, rng: random.Random, limit: int, bucket_bytes: int, problems: Problems
) -> list[Path]:
    """Validate all records of a file and write each to a random bucket; the buckets' paths."""
    count = min(MAX_BUCKETS, file.stat().st_size // bucket_bytes + 1)
    paths = [folder / f".bucket-{i}" for i in range(count)]
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(open(path, "wb")) for path in paths]
        before, empty = problems.count, True
        for number, line in _lines(file, problems):
            empty = False
            value, reason = records.parse_line(line)
            found = [reason] if reason else records.validate(value)
            payload = b"" if found else encode(value)
            if len(payload) > limit:
                found = [
                    f"the record takes {len(payload)} bytes, a block holds {limit} "
                    "(give a larger --block-size)"
                ]
            problems.extend(f"{file}:{number}", found)
            if not problems.count:
                rng.choice(buckets).write(LENGTH.pack(len(payload)) + payload)
        if empty and problems.count == before:
            problems.add(str(file), "holds no records")
    return paths


def _lines(file: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """The lines of a file with a progress bar; what is not UTF-8 becomes a problem and ends it."""
    total = file.stat().st_size
    with progress(total=total, description=f"reading {file.stem}", unit="B") as bar:
        try:
            for number, line in records.read_lines(file):
                yield number, line
                bar.update(len(line.encode()) + 1)
        except InputError as error:
            place, _, reason = str(error).removeprefix(f"{file}:").partition(": ")
            problems.add(f"{file}:{place}", reason)


def _append_shuffled(path: Path, rng: random.Random, writer: DatasetWriter) -> None:
    data = path.read_bytes()
    starts = []
    position = 0
    while position < len(data):
        starts.append(position)
        position += LENGTH.size + LENGTH.unpack_from(data, position)[0]
    rng.shuffle(starts)
    for start in starts:
        begin = start + LENGTH.size
        writer.write_payload(data[begin : begin + LENGTH.unpack_from(data, start)[0]])
    path.unlink()
