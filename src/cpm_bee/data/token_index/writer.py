"""Writes a token index; see `reader` for its form.

There are two ways. Preprocessing has the tokens of one bucket of records at a time, and writes each
bucket at its position in the files (`write_arrays`, `write_info`). For a dataset without an index,
`build` reads the records in order, encodes them in chunks and appends each chunk.

Segment trees are numbered in the sorted list of all trees, so that both ways give the same bytes.
`build` knows that list only at the end: it numbers the trees in order of appearance, and then
renumbers them in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cpm_bee import checksums
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.record_pickle import decode
from cpm_bee.data.token_index.arrays import (
    ADDRESS_ARRAYS,
    ARRAYS,
    COUNTED,
    Arrays,
    TokenChunk,
    counts_of,
)
from cpm_bee.disk import open_to_write
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems
from cpm_bee.progress import progress_bar
from cpm_bee.segments import SegmentTree
from cpm_bee.tokenizer import Tokenizer

FORMAT = 3  # part of the folder's name; increment it when the format changes

INFO = "index.json"
CHECKSUMS = "checksums"  # the field with those of each array's blocks
CHUNK_TOKENS = 1 << 18


def folder_name(tokenizer: Tokenizer) -> str:
    """The name of an index's folder within its dataset."""
    return f"token_index-{FORMAT}-{tokenizer.fingerprint[:12]}"


def write_arrays(folder: Path, arrays: Arrays, at: np.ndarray) -> None:
    """Write arrays into the files of an index, which are created if missing.

    Args:
        at: the numbers of items before them, counted as in `COUNTED`.
    """
    for name, values in arrays.items():
        dtype, counted = ARRAYS[name]
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
        with open_to_write(descriptor, "wb", shown=folder / name) as file:
            file.seek(int(at[COUNTED.index(counted)]) * np.dtype(dtype).itemsize)
            file.write(np.ascontiguousarray(values, dtype=dtype).data)


def write_info(
    folder: Path,
    dataset: BinaryDataset,
    tokenizer: Tokenizer,
    counts: np.ndarray,
    trees: Sequence[SegmentTree],
    extension_vocabulary: Iterable[int],
) -> None:
    """Write `index.json`, which completes an index; reads its arrays for their checksums.

    Args:
        counts: the numbers of items of the whole index, as in `COUNTED`.
        trees: all trees, by number.
        extension_vocabulary: the ids that have a sub > 0 in any record.
    """
    info = {
        "dataset": dataset.fingerprint,
        "vocabulary": tokenizer.fingerprint,
        "trees": [[tree.depths, [int(p) for p in tree.predicted]] for tree in trees],
        "extension_vocabulary": sorted(extension_vocabulary),
        **dict(zip(COUNTED, counts.tolist(), strict=True)),
        CHECKSUMS: {name: checksums.of_blocks(folder / name) for name in ARRAYS},
    }
    with open_to_write(folder / INFO) as file:
        file.write(json.dumps(checksums.sealed(info)))


def build(folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
    """Write the index of a dataset into an existing folder.

    Raises:
        InputError: some records cannot be encoded; all are listed.
    """
    encoder = Encoder(tokenizer)
    problems = Problems()
    builder = _Builder(folder)
    chunk = TokenChunk(encoder)
    bar = progress_bar(
        dataset, total=len(dataset), description=f"tokens of {dataset.folder.name}", unit="records"
    )
    positions: list[tuple[int, int]] = []
    for file, offset, payload in bar:
        try:
            chunk.add(decode(payload))
        except InputError as error:
            problems.add(dataset.where(file, offset), str(error))
            continue
        positions.append((file, offset))
        if chunk.num_tokens >= CHUNK_TOKENS:
            builder.append(chunk, positions)
            chunk, positions = TokenChunk(encoder), []
    problems.raise_if_any(f"{dataset.folder}: records that this model cannot read:")
    builder.append(chunk, positions)
    builder.close(dataset, tokenizer)


class _Builder:
    """Appends chunks to the files of an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts = np.zeros(len(COUNTED), dtype=np.int64)
        self._trees: dict[SegmentTree, int] = {}
        self._extension_vocabulary: set[int] = set()

    def append(self, chunk: TokenChunk, positions: list[tuple[int, int]]) -> None:
        arrays = chunk.arrays()
        numbers = [self._trees.setdefault(tree, len(self._trees)) for tree in chunk.trees]
        arrays["trees"] = np.array(numbers, dtype=np.int32)[arrays["trees"]]
        arrays |= dict(
            zip(ADDRESS_ARRAYS, np.array(positions, dtype=np.int64).reshape(-1, 2).T, strict=True)
        )
        write_arrays(self._folder, arrays, self._counts)
        self._counts += counts_of(arrays)
        self._extension_vocabulary.update(arrays["extension_ids"].tolist())

    def close(self, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        trees = sorted(self._trees)
        if trees:  # so far numbered in order of appearance
            final = np.empty(len(trees), dtype=np.int32)
            final[[self._trees[tree] for tree in trees]] = np.arange(len(trees))
            with open_to_write(self._folder / "trees", "r+b") as file:
                while part := file.read(CHUNK_TOKENS * final.itemsize):
                    file.seek(-len(part), os.SEEK_CUR)
                    file.write(final[np.frombuffer(part, dtype=final.dtype)].data)
        write_info(
            self._folder, dataset, tokenizer, self._counts, trees, self._extension_vocabulary
        )
