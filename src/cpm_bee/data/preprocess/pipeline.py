"""Records in JSON lines -> shuffled binary datasets, even if larger than memory.

There are two passes over the records, each in several processes: `scatter` checks the records and
puts each into a random bucket on disk; `gather` shuffles each bucket in memory and writes its part
of the dataset. With a vocabulary, the same passes make the dataset's token index.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cpm_bee.data.bin_dataset import BinaryDataset, payload_limit
from cpm_bee.data.preprocess.gather import gather
from cpm_bee.data.preprocess.places import check_destinations, input_files
from cpm_bee.data.preprocess.scatter import Buckets, Chunk, Remarks, ScatterResult, scatter
from cpm_bee.data.preprocess.workers import Workers
from cpm_bee.disk import shortage
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems, RunError, keeping
from cpm_bee.files import atomic_folder
from cpm_bee.json_lines import check_is_lines
from cpm_bee.progress import progress_bar
from cpm_bee.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# In bytes of input; a process needs about ten times as much memory. Small files are cut into small
# pieces to keep all processes busy, large files into large pieces to limit the number of files.
LEAST_PIECE, LARGEST_PIECE = 1 << 18, 1 << 22
MAX_BUCKETS = 4096
_RECORD_HELP = 'a record is one line: {"input": "...", "<ans>": "..."}, a literal < written <<'
_SURE = 0.8  # of an estimate of bytes: so many are needed in any case


def preprocess(
    inputs: Path,
    output_path: Path,
    output_name: str,
    *,
    seed: int,
    overwrite: bool,
    block_size: int,
    tokenizer: Tokenizer | None = None,
    tokens_needed: bool = True,
    workers: int = 1,
    escape: bool = False,
    chunk_bytes: int | None = None,
    bucket_bytes: int | None = None,
    shown: Mapping[str, str] | None = None,
) -> list[BinaryDataset]:
    """Make a dataset `output_path/STEM` from each file `STEM.jsonl`; all of them or none.

    The same input, seed, block, chunk and bucket size give the same bytes with any number of
    workers. In between, the records and their tokens are on disk twice.

    Args:
        inputs: a folder with *.jsonl files, or one file of records.
        output_path: the folder of the datasets, made if missing.
        output_name: the name of the data file in each dataset.
        seed, overwrite: the random seed of the shuffle; replace existing datasets.
        block_size: bytes per block (docs/format.md §9).
        tokenizer: makes the token index of each dataset; None makes none.
        tokens_needed: if true, a record that the tokenizer cannot encode is an error; otherwise
            the datasets are written without an index, with a warning.
        workers: the number of processes.
        escape: treat all texts as plain, so that a literal `<` needs no escaping.
        chunk_bytes: bytes of input per task; None chooses by the file's size.
        bucket_bytes: approximate bytes of input per bucket; None chooses by the file's size.
        shown: what the files are called in messages, by their names; None: their paths.

    Raises:
        InputError: records are invalid (all problems of all files are listed), or a dataset exists
            and `overwrite` is false. Nothing is left behind.
    """
    files = input_files(inputs)
    check_destinations(output_path, output_name, [file.stem for file in files], overwrite)
    kept = "no dataset was written, and existing ones are unchanged"
    with keeping(kept), contextlib.ExitStack() as datasets:
        scatters = [
            _Scatter(
                file=file,
                folder=datasets.enter_context(
                    atomic_folder(output_path / file.stem, replace=overwrite)
                ),
                shown=(shown or {}).get(file.name, str(file)),
                chunk_bytes=chunk_bytes or _piece(file, 64),
                bucket_bytes=bucket_bytes or _piece(file, 16),
                seed=seed,
                limit=payload_limit(block_size),
                tokens_needed=tokens_needed,
                escape=escape,
            )
            for file in files
        ]
        _scatter_all(scatters, inputs, output_path, tokenizer, workers)
        if tokenizer is not None and any(s.unencodable.count for s in scatters):
            _warn_of_vocabulary(tokenizer, scatters)
            tokenizer = None
        for s in scatters:
            # The dataset has all that the buckets have, which are removed when it is complete.
            _raise_shortage(output_path / s.file.stem, 0.9 * sum(s.written), "the dataset")
            gather(s.buckets, s.folder, output_name, seed, block_size, tokenizer, workers)
    return [BinaryDataset(output_path / s.file.stem) for s in scatters]


def _scatter_all(
    scatters: list[_Scatter],
    inputs: Path,
    output_path: Path,
    tokenizer: Tokenizer | None,
    workers: int,
) -> None:
    """Run the first pass over all files, and warn of their answers.

    Raises:
        InputError: records are invalid; all problems of all files are listed.
    """
    problems = Problems()
    check_room = partial(_require_room, output_path, scatters)
    num_chunks = sum(len(s.chunks) for s in scatters)
    with Workers(_encoder(tokenizer), min(workers, num_chunks)) as processes:
        for s in scatters:
            s.run(processes, problems, check_room)
    problems.raise_if_any(f"{inputs}: {problems.count} problems, nothing was written", _RECORD_HELP)
    for s in scatters:
        s.warn_of_answers()


def _require_room(output_path: Path, scatters: list[_Scatter]) -> None:
    """Raise `RunError` if the disk is clearly too small, judged by the first chunks.

    For a time, all buckets and one dataset are there.
    """
    sizes = [s.file.stat().st_size for s in scatters]
    firsts = [(s.written[:1], s.chunks[0]) for s in scatters if s.chunks_read]
    read = sum(end - begin for _, (begin, end) in firsts)
    ratio = sum(sum(written) for written, _ in firsts) / read
    needed = _SURE * ratio * (sum(sizes) + max(sizes))
    needed -= sum(sum(s.written) for s in scatters)
    _raise_shortage(output_path, needed, "making the datasets")


def _raise_shortage(path: Path, needed: float, what: str) -> None:
    if reason := shortage(path, needed, what):
        raise RunError(f"{path}: {reason}; no dataset was written, and existing ones are unchanged")


def _piece(file: Path, count: int) -> int:
    return min(max(file.stat().st_size // count, LEAST_PIECE), LARGEST_PIECE)


def _encoder(tokenizer: Tokenizer | None) -> Encoder | None:
    if tokenizer is None:
        return None
    tokenizer.match("")  # builds its trie, which the forked processes then share
    return Encoder(tokenizer)


def _warn_of_vocabulary(tokenizer: Tokenizer, files: list[_Scatter]) -> None:
    count = sum(file.unencodable.count for file in files)
    shown = "".join(file.listed(file.unencodable) for file in files)
    logger.warning(
        f"no token index is made, training will make one: {tokenizer.source} cannot encode {count} "
        f"of the records:{shown}\n"
        "give the vocabulary of your model with --vocab FILE, or make no index with --vocab none"
    )


@dataclass
class _Scatter:
    """The first pass over a file.

    Attributes:
        file: the input.
        folder: the folder of the dataset.
        shown: what the file is called in messages.
        limit: the largest size of a payload in bytes.
        buckets: the buckets that contain its records.
        unanswered, unwritable, unencodable: see `ScatterResult`.
    """

    file: Path
    folder: Path
    shown: str
    chunk_bytes: int
    bucket_bytes: int
    seed: int
    limit: int
    tokens_needed: bool
    escape: bool
    buckets: Buckets = field(init=False)
    num_records: int = 0
    chunks_read: int = 0
    unanswered: Remarks = field(default_factory=Remarks)
    unwritable: Remarks = field(default_factory=Remarks)
    unencodable: Remarks = field(default_factory=Remarks)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The bytes at which each chunk begins and ends."""
        size = self.file.stat().st_size
        return [(b, min(b + self.chunk_bytes, size)) for b in range(0, size, self.chunk_bytes)]

    @property
    def written(self) -> list[int]:
        """The sizes of the chunks' files that are there."""
        paths = self.buckets.paths if self.chunks_read else ()
        return [path.stat().st_size for path in paths if path.exists()]

    def run(self, processes: Workers, problems: Problems, check_room: Callable[[], None]) -> None:
        try:
            check_is_lines(self.file)
        except InputError as error:
            problems.include(error)
            return
        num_buckets = min(MAX_BUCKETS, self.file.stat().st_size // self.bucket_bytes + 1)
        self.buckets = Buckets(num_buckets)

        def tasks() -> Iterator[Chunk]:
            for number, (begin, end) in enumerate(self.chunks):
                target = self.folder / f".chunk-{number}"
                self.buckets.paths.append(target)
                yield Chunk(
                    self.file,
                    begin,
                    end,
                    seed=f"{self.seed}/chunk {number}",
                    num_buckets=num_buckets,
                    limit=self.limit,
                    target=None if problems.count else target,
                    tokens_needed=self.tokens_needed,
                    escape=self.escape,
                )

        before = problems.count
        num_lines = 0
        size = self.file.stat().st_size
        with progress_bar(total=size, description=f"reading {self.file.stem}", unit="B") as bar:
            for result in processes.map(scatter, tasks()):
                self._note(result, num_lines + 1, problems)
                num_lines += result.num_lines
                self.num_records += result.num_records
                self.chunks_read += 1
                if self.chunks_read == 1:
                    check_room()
                bar.update(min(self.chunk_bytes, size))
                if not result.is_text:
                    break
        if self.num_records == 0 and problems.count == before:
            problems.add(self.shown, "holds no records")

    def _note(self, result: ScatterResult, first_line: int, problems: Problems) -> None:
        for line, reason in result.problems:
            problems.add(f"{self.shown}:{first_line + line}", reason)
        problems.count += result.num_problems - len(result.problems)
        self.unanswered.extend(result.unanswered, first_line)
        self.unwritable.extend(result.unwritable, first_line)
        self.unencodable.extend(result.unencodable, first_line)
        self.buckets.add(result)

    def listed(self, remarks: Remarks) -> str:
        """The text of some remarks, one line each."""
        lines = [f"\n  {self.shown}:{line}: {text}" for line, text in remarks.shown]
        more = remarks.count - len(lines)
        return "".join(lines) + (f"\n  ... and {more} more in {self.shown}" if more else "")

    def warn_of_answers(self) -> None:
        """Warn of records without an answer, and of answers that cannot be generated."""
        if self.unanswered.count:
            line, _ = self.unanswered.shown[0]
            logger.warning(
                f"{self.shown}: {self.unanswered.count} of {self.num_records} records have no "
                f'answer ("<ans>" is empty), the first one on line {line}; training and evaluation '
                "leave them out"
            )
        if self.unwritable.count:
            logger.warning(
                f"{self.shown}: {self.unwritable.count} of {self.num_records} records have an "
                "answer that can never be generated, because some of its characters are not in the "
                f"vocabulary; exact match counts it as wrong:{self.listed(self.unwritable)}"
            )
