"""The first pass of preprocessing: lines of JSON -> checked records, in random buckets on disk.

A file may be larger than memory, so it cannot be shuffled at once. Each record is put into a random
bucket; `gather` then shuffles each bucket in memory.

The input is cut into chunks of bytes, which worker processes handle independently; a line belongs
to the chunk in which it begins. The result of a chunk depends only on its position in the input,
not on the process. Its records are written to one file, bucket by bucket (see `chunk_file`).
"""

from __future__ import annotations

import functools
import operator
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpm_bee import json_lines, records
from cpm_bee.data.bin_dataset import frame
from cpm_bee.data.preprocess.chunk_file import write_chunk
from cpm_bee.data.record_pickle import encode
from cpm_bee.data.token_index import arrays as token_arrays
from cpm_bee.data.token_index.arrays import TokenChunk
from cpm_bee.encoding import AnswerState, Encoder
from cpm_bee.errors import InputError
from cpm_bee.segments import SegmentTree

MAX_SHOWN = 1000  # problems of a chunk that are kept
REMARKS_SHOWN = 10


class Chunk(NamedTuple):
    """The lines of `file` that begin at bytes `begin` to `end` - 1.

    Attributes:
        seed: the seed for choosing buckets, different for each chunk.
        num_buckets: the number of buckets.
        limit: the largest size of a payload in bytes.
        target: the file to write to; None only checks.
        tokens_needed: whether a record that the vocabulary cannot encode is a problem.
        escape: treat all texts as plain (see `records.escape_texts`).
    """

    file: Path
    begin: int
    end: int
    seed: str
    num_buckets: int
    limit: int
    target: Path | None
    tokens_needed: bool
    escape: bool = False


@dataclass
class Remarks:
    """Valid lines that deserve a warning: their number, and the first of them."""

    count: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, text: str = "") -> None:
        self.count += 1
        self.shown.append((line, text))
        if len(self.shown) > 2 * REMARKS_SHOWN:
            self.shown = sorted(self.shown)[:REMARKS_SHOWN]

    def extend(self, other: Remarks, first_line: int) -> None:
        """Add the remarks of a later part of the file, which begins at `first_line`."""
        self.count += other.count
        moved = [(first_line + line, text) for line, text in sorted(other.shown)]
        self.shown = (self.shown + moved)[:REMARKS_SHOWN]


@dataclass
class ScatterResult:
    """The result of scattering a chunk.

    Attributes:
        num_lines: the number of lines, including blank ones.
        num_records: the number of lines that are not blank.
        num_problems: the number of all problems.
        problems: (line of the chunk from 0, reason) of the first `MAX_SHOWN` problems.
        is_text: false if a line is not UTF-8; the rest of the chunk was not read.
        unanswered: records without an answer.
        unwritable: records whose answer generation cannot write, with the parts it cannot write.
        unencodable: records that the vocabulary cannot encode, with the reason; if there are any,
            the chunk has no tokens.
        filled: a bit for each bucket, set if the chunk has records in it.
        counts: the size of each bucket (see `token_index.arrays.COUNTED`), int64 [buckets, 3]; None
            without tokens.
        trees: the segment trees, by number within the chunk.
        extension_vocabulary: the ids that have a sub > 0.
    """

    num_lines: int = 0
    num_records: int = 0
    num_problems: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    is_text: bool = True
    unanswered: Remarks = field(default_factory=Remarks)
    unwritable: Remarks = field(default_factory=Remarks)
    unencodable: Remarks = field(default_factory=Remarks)
    filled: int = 0
    counts: np.ndarray | None = None
    trees: list[SegmentTree] = field(default_factory=list)
    extension_vocabulary: set[int] = field(default_factory=set)

    def add(self, line: int, reasons: list[str]) -> None:
        self.num_problems += len(reasons)
        self.problems += [(line, reason) for reason in reasons]
        if len(self.problems) > 2 * MAX_SHOWN:
            self.problems = sorted(self.problems)[:MAX_SHOWN]


@dataclass
class Buckets:
    """The records of a whole file, in buckets on disk.

    Attributes:
        num_buckets: the number of buckets.
        paths: the files of the chunks.
        filled: the bits of each chunk, see `ScatterResult`.
        counts: the size of each bucket, see `ScatterResult`.
        trees: the segment trees of each chunk.
        extension_vocabulary: the ids that have a sub > 0.
    """

    num_buckets: int
    paths: list[Path] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    counts: np.ndarray | None = None
    trees: list[list[SegmentTree]] = field(default_factory=list)
    extension_vocabulary: set[int] = field(default_factory=set)

    def add(self, result: ScatterResult) -> None:
        if result.counts is not None:
            self.counts = result.counts if self.counts is None else self.counts + result.counts
        self.filled.append(result.filled)
        self.trees.append(result.trees)
        self.extension_vocabulary |= result.extension_vocabulary

    def with_records(self) -> list[int]:
        """The buckets that have records."""
        union = functools.reduce(operator.or_, self.filled, 0)
        return [bucket for bucket in range(self.num_buckets) if union >> bucket & 1]

    def chunks_of(self, bucket: int) -> array[int]:
        """The chunks that have records in a bucket."""
        return array("I", [n for n, bits in enumerate(self.filled) if bits >> bucket & 1])


def scatter(encoder: Encoder | None, chunk: Chunk) -> ScatterResult:
    """Check the records of a chunk, encode them and write records and tokens to its file."""
    result = ScatterResult()
    lines = _lines(chunk, result)
    rng = random.Random(chunk.seed)
    buckets = [int(rng.random() * chunk.num_buckets) for _ in lines]
    order = sorted(range(len(lines)), key=buckets.__getitem__)
    tokens = None if encoder is None else TokenChunk(encoder)
    frames: list[bytes] = []
    for i in order:
        number, line = lines[i]
        lines[i] = number, ""  # frees memory
        value, reason = json_lines.parse_line(line)
        if chunk.escape:
            value = records.escape_texts(value)
        found = [reason] if reason else records.validate(value)
        if not found:
            payload = encode(value)
            frames.append(frame(payload))
            if len(payload) > chunk.limit:
                found.append(
                    f"the record takes {len(payload)} bytes, a block holds {chunk.limit} "
                    "(give a larger --block-size)"
                )
            if not records.has_answer(value[records.ANSWER]):
                result.unanswered.add(number)
            if encoder is not None and tokens is not None:
                try:
                    if tokens.add(value) & ~AnswerState.RENUMBERED == AnswerState.KNOWN:
                        pieces = encoder.unwritable_pieces(value)
                        result.unwritable.add(number, ", ".join(map(repr, pieces)))
                except InputError as error:
                    if chunk.tokens_needed:
                        found.append(str(error))
                    else:
                        result.unencodable.add(number, str(error))
        result.add(number, found)
    if result.unencodable.count:
        tokens = None
    result.problems = sorted(result.problems)[:MAX_SHOWN]
    if lines and not result.num_problems and chunk.target is not None:
        sizes = [0] * chunk.num_buckets
        for bucket in buckets:
            sizes[bucket] += 1
        result.filled = sum(1 << bucket for bucket, size in enumerate(sizes) if size)
        arrays = ends = None
        if tokens is not None:
            arrays = tokens.arrays()
            ends = token_arrays.ends_of(arrays, sizes)
            result.trees = tokens.trees
            result.extension_vocabulary = set(arrays["extension_ids"].tolist())
            result.counts = np.diff(ends, axis=0, prepend=0)
        write_chunk(chunk.target, frames, sizes, arrays, ends)
    return result


def _lines(chunk: Chunk, result: ScatterResult) -> list[tuple[int, str]]:
    """The non-blank lines of a chunk, with their numbers in the chunk from 0."""
    lines: list[tuple[int, str]] = []
    for number, raw in enumerate(_raw_lines(chunk)):
        result.num_lines = number + 1
        line, reason = json_lines.decode_line(
            raw, chunk.file, is_first=number == 0 and chunk.begin == 0
        )
        if reason:
            result.add(number, [reason])
            result.is_text = False
            break
        if line:
            lines.append((number, line))
    result.num_records = len(lines)
    return lines


def _raw_lines(chunk: Chunk) -> Iterator[bytes]:
    with open(chunk.file, "rb") as file:
        position = chunk.begin
        if position > 0:
            # The preceding line may reach into the chunk, or beyond it.
            file.seek(position - 1)
            before = file.readline(chunk.end - position + 1)
            if not before.endswith(b"\n"):
                return
            position += len(before) - 1
        while position < chunk.end and (raw := file.readline()):
            position += len(raw)
            yield raw
