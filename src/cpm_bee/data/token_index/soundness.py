"""Checks the arrays of an index: the sizes, sums and ranges that other code relies on.

Arrays with one item per record are checked when an index is opened. The arrays of tokens, which may
have gigabytes, are checked when batches are made from them. The same holds for the checksums, which
find any other change.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from cpm_bee import checksums
from cpm_bee.data.token_index.arrays import ARRAYS, COUNTED
from cpm_bee.data.token_index.writer import CHECKSUMS
from cpm_bee.errors import DamagedFile
from cpm_bee.segments import MAX_SEGMENTS, SegmentTree

# The exceptions that reading a damaged `index.json` may raise.
UNREADABLE: tuple[type[Exception], ...] = (
    ValueError, LookupError, TypeError, OverflowError, RecursionError, AttributeError,
)  # fmt: skip


# The fields of `index.json`; earlier versions wrote no checksums.
_FIELDS = {"dataset", "vocabulary", "trees", "extension_vocabulary", *COUNTED}
_WITH_CHECKSUMS = {*_FIELDS, CHECKSUMS, checksums.SEAL}
# Bytes of an index that is compared as a whole when it is opened.
_SMALL = 64 << 20


def read_info(path: Path) -> dict[str, Any]:
    """The contents of `index.json`.

    Raises:
        DamagedFile: they have changed since they were written.
        ValueError: the file is damaged otherwise.
    """
    info = json.loads(path.read_text(encoding="utf-8"))
    # A name with a changed bit must not pass for a field that an earlier version lacks.
    if not isinstance(info, dict) or info.keys() not in (_FIELDS, _WITH_CHECKSUMS):
        raise ValueError(f"{path}: not the fields of an index")
    if CHECKSUMS in info and not checksums.is_intact(info):
        raise DamagedFile(f"{path}: has changed since it was written (checksum)")
    return info


class ArrayBlocks:
    """The blocks of an index's files, each compared with its checksum before its first use.

    Those of a small index, and of arrays with one item per record, are compared at once.

    Args:
        maps: the memory-mapped files by array.
        lists: the checksums by array; None if the index has none.
        remedy: what to do about damage that is found later.

    Raises:
        DamagedFile: a checksum differs.
    """

    def __init__(
        self,
        folder: Path,
        maps: dict[str, mmap.mmap | bytes],
        lists: dict[str, list[int]] | None,
        remedy: str,
    ) -> None:
        self._blocks = {
            name: checksums.CheckedBlocks(folder / name, len(data), lists[name], remedy)
            for name, data in maps.items()
            if lists is not None
        }
        is_small = sum(map(len, maps.values())) <= _SMALL
        for name, blocks in self._blocks.items():
            if is_small or ARRAYS[name][1] == "records":
                blocks.check(0, len(maps[name]))

    def check(self, counted: str, begins: np.ndarray, ends: np.ndarray) -> None:
        """Compare what is about to be read of the arrays of tokens or of extensions.

        Args:
            begins, ends: runs of items; int64 [N] each.
        """
        for name, blocks in self._blocks.items():
            dtype, own = ARRAYS[name]
            if own == counted and blocks.num_unused:
                size = np.dtype(dtype).itemsize
                numbers = _blocks_of(begins * size, ends * size)
                unused = np.frombuffer(blocks.unused, dtype=np.bool_)[numbers]
                for number in np.unique(numbers[unused]).tolist():
                    blocks.check(number * checksums.BLOCK, number * checksums.BLOCK + 1)


def _blocks_of(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers of the blocks that have some of the bytes of runs; with repetitions."""
    first = begins // checksums.BLOCK
    counts = np.maximum(-(-ends // checksums.BLOCK) - first, 0)
    shifts = first - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(shifts, counts)


def is_within(values: np.ndarray, end: int) -> bool:
    """Whether all values lie in [0, end)."""
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < end)


def read_trees(info: dict[str, Any]) -> list[SegmentTree]:
    """The trees in `index.json`; raises one of `UNREADABLE` if they are damaged."""
    trees = []
    for depths, predicted in info["trees"]:
        sound = 0 < len(depths) == len(predicted) <= MAX_SEGMENTS and depths[0] == 0
        if not sound or not all(type(d) is int and 0 <= d < 256 for d in depths):
            raise ValueError("a tree is damaged")
        if any(p not in (0, 1) for p in predicted):
            raise ValueError("a tree is damaged")
        trees.append(SegmentTree(tuple(depths), tuple(map(bool, predicted))))
    return trees


def check_arrays(
    arrays: dict[str, np.ndarray],
    info: dict[str, Any],
    num_trees: int,
    num_files: int,
    vocab_size: int,
) -> None:
    """Raise one of `UNREADABLE` if the arrays are damaged."""
    lengths, targets = arrays["lengths"], arrays["num_targets"]
    vocabulary = np.array(info["extension_vocabulary"], dtype=np.int64)
    ends = {"files": num_files, "trees": num_trees, "offsets": 1 << 62}
    for name, (_, counted) in ARRAYS.items():
        checked = counted == "records" and name != "shuffled"
        if checked and not is_within(arrays[name], ends.get(name, 1 << 31)):
            raise ValueError(f"{name}: a number out of range")
    if (
        int(lengths.sum(dtype=np.int64)) != info["tokens"]
        or int(arrays["extension_counts"].sum(dtype=np.int64)) != info["extensions"]
        or bool((targets > lengths).any())
        or vocabulary.ndim != 1
        or not is_within(vocabulary, vocab_size)
        or bool((np.diff(vocabulary) <= 0).any())
    ):
        raise ValueError("its sums do not agree")
