"""The second pass of preprocessing: buckets on disk -> a dataset, and its token index.

`scatter` has put every record into a random bucket. This pass shuffles the records of each bucket
and writes the buckets in order, which gives a random order of all records with at most one bucket
per process in memory.

The main process does the shuffling: it reads only the sizes of a bucket's records, and computes
where each record begins in the data file and where the bucket begins in the token index. Worker
processes then write the buckets independently, at these positions of the same files. The bytes are
the same for any number of workers.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpm_bee.data.bin_checksums import write_checksums
from cpm_bee.data.bin_dataset import END, BinaryDataset, BlockLayout
from cpm_bee.data.bin_meta import write_meta
from cpm_bee.data.preprocess.chunk_file import read_part, read_sizes
from cpm_bee.data.preprocess.scatter import Buckets
from cpm_bee.data.preprocess.workers import Workers
from cpm_bee.data.token_index import arrays as token_arrays
from cpm_bee.data.token_index.writer import folder_name, write_arrays, write_info
from cpm_bee.disk import open_to_write
from cpm_bee.errors import naming
from cpm_bee.progress import progress_bar
from cpm_bee.segments import SegmentTree
from cpm_bee.tokenizer import Tokenizer


@dataclass
class _Paths:
    """The files that the processes of the second pass read and write.

    Attributes:
        chunks: the files that `scatter` wrote, one for each chunk of the input.
        data: the data file.
        index: the folder of the token index; None if none is made.
        tree_numbers: for each chunk, the number in the index of each of its trees.
    """

    chunks: list[Path]
    data: Path
    index: Path | None = None
    tree_numbers: list[np.ndarray] = field(default_factory=list)


class _Bucket(NamedTuple):
    """A bucket's records in their final order.

    Attributes:
        number: the number of the bucket.
        chunks: the chunks that have records in the bucket; no others are opened.
        order: the records' numbers within the bucket.
        offsets: where they begin in the data file.
        index_at: where the bucket begins in the index, counted as in `token_index.arrays.COUNTED`.
    """

    number: int
    chunks: array[int]
    order: array[int]
    offsets: array[int]
    index_at: np.ndarray | None


def gather(
    buckets: Buckets,
    folder: Path,
    output_name: str,
    seed: int,
    block_size: int,
    tokenizer: Tokenizer | None,
    workers: int,
) -> None:
    """Make a dataset in an existing folder and remove the buckets.

    Args:
        tokenizer: the tokenizer that made the chunks' tokens; None makes no index.
    """
    files = _Paths(buckets.paths, folder / output_name)
    files.data.touch(exist_ok=False)
    layout = BlockLayout(block_size)
    counts = None if tokenizer is None else buckets.counts
    trees: list[SegmentTree] = []
    if tokenizer is not None:
        files.index = folder / folder_name(tokenizer)
        files.index.mkdir()
        trees = _number_trees(files, buckets)
    filled = buckets.with_records()
    tasks = _tasks(buckets, filled, seed, layout, counts)
    with (
        Workers(files, min(workers, len(filled))) as processes,
        progress_bar(
            total=len(filled), description=f"writing {folder.name}", unit="buckets"
        ) as bar,
    ):
        for _ in processes.map(_write_bucket, tasks):
            bar.update()
    for path, bits in zip(buckets.paths, buckets.filled, strict=True):
        if bits:
            path.unlink()
    with open_to_write(files.data, "r+b") as file, naming(files.data):
        file.truncate(layout.size)  # extends the file; bytes that were not written are zeros
        for end in layout.ends:  # written, since on a full tmpfs a hole cannot be read from a map
            file.seek(end)
            file.write(END)
    write_meta(folder, layout.info(output_name))
    write_checksums(folder, layout.info(output_name))
    if tokenizer is not None and files.index is not None and counts is not None:
        dataset, total = BinaryDataset(folder), counts.sum(axis=0)
        write_info(files.index, dataset, tokenizer, total, trees, buckets.extension_vocabulary)


def _number_trees(files: _Paths, buckets: Buckets) -> list[SegmentTree]:
    """Returns all trees, sorted, and sets `files.tree_numbers`."""
    trees = sorted(set().union(*buckets.trees))
    numbers = {tree: number for number, tree in enumerate(trees)}
    files.tree_numbers = [
        np.array([numbers[tree] for tree in own], dtype=np.int32) for own in buckets.trees
    ]
    return trees


def _tasks(
    buckets: Buckets, filled: list[int], seed: int, layout: BlockLayout, counts: np.ndarray | None
) -> Iterator[_Bucket]:
    index_at = None if counts is None else counts.cumsum(axis=0) - counts
    for number in filled:
        chunks, sizes = buckets.chunks_of(number), array("I")
        for chunk in chunks:
            sizes.extend(read_sizes(buckets.paths[chunk], number))
        order = array("I", range(len(sizes)))
        random.Random(f"{seed}/bucket {number}").shuffle(order)
        offsets = layout.append(map(sizes.__getitem__, order))
        at = None if index_at is None else index_at[number]
        yield _Bucket(number, chunks, order, offsets, at)


def _write_bucket(files: _Paths, bucket: _Bucket) -> None:
    parts = [read_part(files.chunks[chunk], bucket.number) for chunk in bucket.chunks]
    frames = []
    for part in parts:
        begin = 0
        for size in part.sizes:
            frames.append(part.frames[begin : begin + size])
            begin += size
    with open_to_write(files.data, "r+b") as file:
        end = -1
        for offset, number in zip(bucket.offsets, bucket.order, strict=True):
            if offset != end:
                file.seek(offset)
            file.write(frames[number])
            end = offset + len(frames[number])
    if files.index is None or bucket.index_at is None:
        return
    tokens = [token_arrays.from_bytes(part.tokens, len(part.sizes)) for part in parts]
    for arrays, chunk in zip(tokens, bucket.chunks, strict=True):
        arrays["trees"] = files.tree_numbers[chunk][arrays["trees"]]
    joined = token_arrays.join(tokens)
    del frames, parts, tokens  # frees memory
    arrays = token_arrays.take(joined, np.array(bucket.order, dtype=np.int64))
    arrays["files"] = np.zeros(len(bucket.order))
    arrays["offsets"] = np.array(bucket.offsets)
    write_arrays(files.index, arrays, bucket.index_at)
