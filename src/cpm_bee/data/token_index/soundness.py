"""Checks the arrays of an index: the sizes, sums and ranges that other code relies on.

Arrays with one item per record are checked when an index is opened. The arrays of tokens, which may
have gigabytes, are checked when batches are made from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpm_bee.data.token_index.arrays import ARRAYS
from cpm_bee.segments import MAX_SEGMENTS, SegmentTree

# The exceptions that reading a damaged `index.json` may raise.
UNREADABLE: tuple[type[Exception], ...] = (
    ValueError, LookupError, TypeError, OverflowError, RecursionError, AttributeError,
)  # fmt: skip


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
