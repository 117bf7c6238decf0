"""Record -> segments: the nodes of its tree, and the relations between them (docs/format.md §3).

A segment is a key or a string leaf, in depth-first order; segment 0 is the root. The model sees
the tree as one bucket per ordered pair of segments, computed from the number of steps up from the
first to their lowest common ancestor and down to the second. Many records have the same tree, so
trees and their relations are cached.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cpm_bee.records import ANSWER, Record, Tree

NUM_DEPTHS = 8  # relations distinguish this many numbers of steps (0 to 7), up and down
OTHER_SAMPLE = 1  # the bucket of a segment in another in-context sample
HIDDEN = 255  # instead of a bucket: the second segment is not visible to the first
# A record with S segments has S squared relations: without a limit, one line could fill memory.
MAX_SEGMENTS = 4096
# Relations of trees up to this size are cached; the 4,096 cached ones take at most 64 MiB.
_CACHED_SEGMENTS = 128


class SegmentTree(NamedTuple):
    """The depth and role of each of a record's S segments; the depths determine its relations.

    The leaves under `<ans>` are predicted.
    """

    depths: tuple[int, ...]
    predicted: tuple[bool, ...]

    @property
    def relations(self) -> np.ndarray:
        """The bucket of each ordered pair of segments, uint8 [S, S]."""
        if len(self.depths) > _CACHED_SEGMENTS:
            return _relations.__wrapped__(self.depths)
        return _relations(self.depths)


class SpanTree(NamedTuple):
    """The trees of a record and of its in-context samples, which follow it (docs/format.md §5.5).

    It is used like a `SegmentTree`: the segments are numbered through all trees. All segments of
    samples are given.
    """

    record: SegmentTree
    samples: tuple[SegmentTree, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        return sum((tree.depths for tree in self.samples), self.record.depths)

    @property
    def predicted(self) -> tuple[bool, ...]:
        return self.record.predicted + (False,) * (len(self.depths) - len(self.record.depths))

    @property
    def relations(self) -> np.ndarray:
        """The bucket of each ordered pair of segments, uint8 [S, S].

        Between the record and a sample it is `OTHER_SAMPLE`, and between a sample and all others
        `HIDDEN`: samples see only themselves, the record sees all.
        """
        if len(self.depths) > _CACHED_SEGMENTS:
            return _span_relations.__wrapped__(self)
        return _span_relations(self)


@lru_cache(maxsize=256)
def _span_relations(tree: SpanTree) -> np.ndarray:
    size, end = len(tree.depths), len(tree.record.depths)
    result = np.full((size, size), HIDDEN, dtype=np.uint8)
    result[:end, end:] = OTHER_SAMPLE
    begin = 0
    for own in (tree.record, *tree.samples):
        end = begin + len(own.depths)
        result[begin:end, begin:end] = own.relations
        begin = end
    result.setflags(write=False)
    return result


class Outline(NamedTuple):
    """The segments of a record: their texts and their tree."""

    texts: list[str]
    tree: SegmentTree


def outline(record: Record, rng: random.Random | None = None) -> Outline:
    """Returns the segments of a valid record (see `records.validate`).

    With `rng`, the items of dictionaries under `<ans>` are shuffled, as in training.
    """
    texts, codes = ["<root>"], bytearray(1)
    _outline(record, 1, False, rng, texts, codes)
    return Outline(texts, _segment_tree(bytes(codes)))


def _outline(
    node: dict[str, Tree],
    depth: int,
    under_answer: bool,
    rng: random.Random | None,
    texts: list[str],
    codes: bytearray,
) -> None:
    items = list(node.items())
    if under_answer and rng is not None:
        rng.shuffle(items)
    for key, value in items:
        answer = under_answer or (depth == 1 and key == ANSWER)
        texts.append(key)
        codes.append(2 * depth)
        if isinstance(value, str):
            texts.append(value)
            codes.append(2 * depth + 2 + answer)
        else:
            _outline(value, depth + 1, answer, rng, texts, codes)


@lru_cache(maxsize=4096)
def _segment_tree(codes: bytes) -> SegmentTree:
    """The tree of segments that are coded as 2 * depth, plus 1 if predicted."""
    return SegmentTree(tuple(code // 2 for code in codes), tuple(code % 2 == 1 for code in codes))


def is_shuffled(record: Record) -> bool:
    """Whether `rng` changes anything: some dictionary under `<ans>` has two items or more."""
    return _has_choice(record[ANSWER])


def _has_choice(node: Tree) -> bool:
    if isinstance(node, str):
        return False
    return len(node) > 1 or any(map(_has_choice, node.values()))


@lru_cache(maxsize=4096)
def _relations(depths: tuple[int, ...]) -> np.ndarray:
    # In depth-first order the depth of the lowest common ancestor of a and a later b is the minimum
    # of depth(a) and depth(i) - 1 over the segments i after a, up to and including b.
    depth = np.asarray(depths, dtype=np.int16)
    common = np.empty((len(depth), len(depth)), dtype=np.int16)  # (S, S)
    for a in range(len(depth)):
        steps = np.concatenate([depth[a : a + 1], depth[a + 1 :] - 1])
        common[a, a:] = common[a:, a] = np.minimum.accumulate(steps)
    up = np.minimum(depth[:, None] - common, NUM_DEPTHS - 1)
    down = np.minimum(depth[None, :] - common, NUM_DEPTHS - 1)
    bucket = up * NUM_DEPTHS + down
    result = np.where(bucket > 0, bucket + 1, 0).astype(np.uint8)
    np.fill_diagonal(result, 0)
    result.setflags(write=False)
    return result
