"""The temporary file of a chunk's records, between the two passes of preprocessing.

A chunk's records are stored in one file, bucket by bucket. The file begins with a table of the
offset of each bucket's part and of the end (uint64). A part has the number of its records (uint32),
the size of each record's frame (uint32), the frames (see `bin_dataset.frame`) and, if there is a
tokenizer, the token arrays of the records (see `token_index.arrays.to_bytes`). The part of a bucket
without records is empty, and a chunk without records has no file: use `Buckets.chunks_of`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from cpm_bee.data.token_index import arrays as token_arrays
from cpm_bee.disk import open_to_write

RECORD_COUNT = struct.Struct("<I")
TABLE_ENTRY = struct.Struct("<Q")  # the offset of a bucket's part


def write_chunk(
    target: Path,
    frames: list[bytes],
    sizes: list[int],
    arrays: token_arrays.Arrays | None,
    ends: np.ndarray | None,
) -> None:
    """Write a chunk's file.

    Args:
        frames: the frames of all records, bucket by bucket.
        sizes: the number of records of each bucket.
        arrays: the token arrays of all records, bucket by bucket; None without tokens.
        ends: where each bucket's part of the arrays ends (see `token_index.arrays.ends_of`).
    """
    parts: Iterator[Iterable[bytes]] | None = None
    if arrays is not None and ends is not None:
        filled = [bucket for bucket, size in enumerate(sizes) if size]
        parts = map(token_arrays.to_bytes, token_arrays.split(arrays, ends[filled]))
    offsets = array("Q")
    with open_to_write(target, "wb") as file:
        file.seek(TABLE_ENTRY.size * (len(sizes) + 1))
        begin = 0
        for size in sizes:
            offsets.append(file.tell())
            if size == 0:
                continue
            _write_frames(file, frames[begin : begin + size])
            begin += size
            if parts is not None:
                file.writelines(next(parts))
        offsets.append(file.tell())
        file.seek(0)
        file.write(offsets.tobytes())


def _write_frames(file: IO[bytes], frames: list[bytes]) -> None:
    file.write(RECORD_COUNT.pack(len(frames)))
    file.write(array("I", map(len, frames)).tobytes())
    file.writelines(frames)


class BucketPart(NamedTuple):
    """The records of a bucket that come from one chunk.

    Attributes:
        sizes: the size of each frame in bytes.
        frames: the frames, concatenated.
        tokens: the bytes of the token arrays; empty without tokens.
    """

    sizes: array[int]
    frames: memoryview
    tokens: memoryview


def read_sizes(path: Path, bucket: int) -> array[int]:
    """The size in bytes of each frame of a bucket's part in a chunk's file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(TABLE_ENTRY.size * bucket)
        (begin,) = TABLE_ENTRY.unpack(file.read(TABLE_ENTRY.size))
        file.seek(begin)
        (count,) = RECORD_COUNT.unpack(file.read(RECORD_COUNT.size))
        return array("I", file.read(4 * count))


def read_part(path: Path, bucket: int) -> BucketPart:
    """A bucket's part of a chunk's file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(TABLE_ENTRY.size * bucket)
        begin, end = struct.unpack("<2Q", file.read(2 * TABLE_ENTRY.size))
        file.seek(begin)
        data = memoryview(file.read(end - begin))
    (count,) = RECORD_COUNT.unpack_from(data)
    first = RECORD_COUNT.size + 4 * count
    sizes = array("I", bytes(data[RECORD_COUNT.size : first]))
    last = first + sum(sizes)
    return BucketPart(sizes, data[first:last], data[last:])
