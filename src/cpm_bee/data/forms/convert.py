"""Data files of any form -> files of records, or a split of them into training and evaluation."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.data.forms.rows import data_files
from cpm_bee.data.forms.sources import Converted, Source, open_sources
from cpm_bee.data.forms.transform import load_transform
from cpm_bee.data.near_duplicates import DuplicateGroups
from cpm_bee.data.split import Template, choose
from cpm_bee.disk import open_to_write
from cpm_bee.errors import InputError, Problems
from cpm_bee.files import atomic_file
from cpm_bee.json_lines import parse_line
from cpm_bee.paths import existing_parent, unwritable_folder
from cpm_bee.progress import progress_bar
from cpm_bee.records import Record

logger = logging.getLogger(__name__)

TRAIN, EVAL = "train", "eval"


def convert_data(
    inputs: Path,
    output: Path,
    options: ConversionOptions,
    *,
    seed: int,
    escape: bool = False,
    overwrite: bool = False,
) -> tuple[list[Converted], dict[Path, int]]:
    """Write the records of data files to `output`; all of them or nothing.

    Args:
        inputs: a data file, or a folder with some.
        output: a folder, made if missing. `NAME.csv` becomes `NAME.jsonl` in it; with
            `options.eval_share` all become `train.jsonl` and `eval.jsonl`.
        seed: the random seed of the split.
        escape: the texts of data that are records already are plain.
        overwrite: replace existing files.

    Returns:
        What became of each data file; and the number of records of each file that was written.

    Raises:
        InputError: rows are bad (all problems of all files are listed), or a file exists.
    """
    transform = load_transform(options.transform) if options.transform else None
    files = data_files(inputs)
    share = options.eval_share
    names = [file.stem for file in files] if share is None else [TRAIN, EVAL]
    targets = [output / f"{name}.jsonl" for name in names]
    _check_targets(files, output, targets, overwrite)
    problems = Problems()
    sources = open_sources(files, options, transform, escape, problems)
    written: dict[Path, int] = {}
    with contextlib.ExitStack() as stack:
        if share is None:
            for source, target in zip(sources, targets, strict=True):
                out = stack.enter_context(atomic_file(target))
                for record, _, _ in source.converted(problems):
                    out.write(_line(record))
                written[target] = source.result.records
        else:
            spool = stack.enter_context(_spool(output))
            numbers: list[int] = []
            for i, source in enumerate(sources):
                for record, row, _ in source.converted(problems):
                    spool.write(_line(record).encode())
                    numbers.append(row * len(sources) + i)
        _refuse(inputs, sources, problems, options.skip_bad)
        if share is not None:
            outs = [stack.enter_context(atomic_file(target)) for target in targets]
            written = dict(
                zip(targets, _split(inputs, spool, numbers, outs, share, seed), strict=True)
            )
    results = [source.result for source in sources]
    for result in results:
        _warn(result)
    return results, written


def read_records(
    inputs: Path, options: ConversionOptions, *, escape: bool = False
) -> Iterator[tuple[str, Record]]:
    """Yields the records of data files with the place of the row that each is made of.

    Raises:
        InputError: rows are bad; all are listed, after the records of the others.
    """
    problems = Problems()
    transform = load_transform(options.transform) if options.transform else None
    for source in open_sources(data_files(inputs), options, transform, escape, problems):
        for record, _, where in source.converted(problems):
            yield where, record
    problems.raise_if_any(f"{inputs}: {problems.count} bad lines:")


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _spool(folder: Path) -> Iterator[IO[bytes]]:
    """A file without a name where the results will be, to be written and then read."""
    with (
        tempfile.TemporaryFile(dir=existing_parent(folder)) as file,
        open_to_write(os.dup(file.fileno()), "r+b", shown=folder) as spool,
    ):
        yield spool


def _split(
    inputs: Path, spool: IO[Any], rows: list[int], outs: list[IO[Any]], share: float, seed: int
) -> list[int]:
    """Distribute the records of a spool; returns the number in each file."""

    def records() -> Iterator[Record]:
        spool.seek(0)
        for line in spool:
            yield parse_line(line.decode())[0]

    template = Template(records())
    groups = DuplicateGroups()
    firsts: dict[int, int] = {}
    bar = progress_bar(
        zip(records(), rows, strict=True), total=len(rows), description="comparing", unit="records"
    )
    for record, row in bar:
        own = template.without(record)
        firsts.setdefault(row, groups.add(own, together_with=firsts.get(row)))
    found = groups.groups()
    chosen = choose(found, share, seed)
    count = int(chosen.sum())
    if not 0 < count < len(chosen):
        raise InputError(
            f"{inputs}: its {len(chosen)} records cannot be split with --eval-share {share:g}: "
            f"they form {len(found)} groups of near-duplicates, the largest of "
            f"{max(map(len, found))} records"
        )
    spool.seek(0)
    for line, is_eval in zip(spool, chosen.tolist(), strict=True):
        outs[is_eval].write(line.decode())
    together = sum(len(group) for group in found if len(group) > 1)
    logger.info(
        f"{inputs}: {count:,} of {len(chosen):,} records for evaluation; {together:,} records are "
        "in groups of near-duplicates, which were kept together"
    )
    return [len(chosen) - count, count]


def _check_targets(files: list[Path], output: Path, targets: list[Path], overwrite: bool) -> None:
    if reason := unwritable_folder(output):
        raise InputError(f"{output}: {reason}")
    for target in targets:
        if target.is_dir():
            raise InputError(f"{target}: this is a folder, expected a file")
        for file in files:
            if target.exists() and target.samefile(file):
                raise InputError(f"{target}: this is the data itself, give another --output")
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        raise InputError(
            f"{', '.join(existing)}: exists already; replace it with --overwrite, or give another "
            "--output"
        )


def _refuse(inputs: Path, sources: list[Source], problems: Problems, skip_bad: bool) -> None:
    if not skip_bad:
        problems.raise_if_any(
            f"{inputs}: {problems.count} bad lines, nothing was written",
            "fix them, or leave them out with --skip-bad",
        )
    for source in sources:
        if not source.result.records:
            bad = f", all of its {source.result.skipped} rows are bad" if problems.count else ""
            raise InputError(
                f"{source.file}: holds no records{bad}; nothing was written\n"
                f"{problems.text()}".rstrip()
            )
    if problems.count:
        logger.warning(f"{problems.count} bad lines were left out:\n{problems.text()}")


def _warn(result: Converted) -> None:
    if result.unanswered:
        unused = ", ".join(map(repr, sorted(result.unused)))
        logger.warning(
            f"{result.source}: {result.unanswered:,} of {result.records:,} records have no answer, "
            f"the first one at {result.first_unanswered}"
            + (f"; keys that were not used: {unused}" if unused else "")
        )
