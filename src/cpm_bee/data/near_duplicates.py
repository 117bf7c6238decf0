"""Near-duplicate records: the same text but for a few characters.

The text of a record is all it gives the model, without its answer, spaces, punctuation and case.
Two records are near-duplicates if the sets of their character 5-grams have a Jaccard similarity of
at least `THRESHOLD`. Comparing all pairs is quadratic, so candidates are found with MinHash
(Broder 1997) and banding: a signature of `_BANDS` * `_ROWS` minima, of which near-duplicates share
at least one whole band with high probability (0.8: 99.96 %, 0.3: 4 %). Candidates are compared
exactly, so no pair is named that is not one.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from cpm_bee.records import ANSWER, Record, Tree

THRESHOLD = 0.8
_GRAM = 5
_BANDS, _ROWS = 20, 5
_TOP = (1 << 64) - 1
_IGNORED = re.compile(r"[\W_]+")


class Duplicate(NamedTuple):
    """A pair of near-duplicate records, by number."""

    record: int
    other: int
    similarity: float


class NearDuplicates:
    """An index of records, to be searched for near-duplicates of others."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        size = (_BANDS * _ROWS, 1)
        self._factors = rng.integers(_TOP, size=size, dtype=np.uint64, endpoint=True) | np.uint64(1)
        self._offsets = rng.integers(_TOP, size=size, dtype=np.uint64, endpoint=True)
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._grams: list[frozenset[int]] = []

    def add(self, record: Record) -> int:
        """Add a record; returns its number, from 0."""
        grams = _grams(record)
        number = len(self._grams)
        self._grams.append(grams)
        for bucket in self._buckets_of(grams):
            self._buckets[bucket].append(number)
        return number

    def find(self, record: Record) -> Iterator[tuple[int, float]]:
        """Yields (number, similarity) of a record's near-duplicates, the most similar first."""
        grams = _grams(record)
        numbers = {n for bucket in self._buckets_of(grams) for n in self._buckets.get(bucket, ())}
        found = [(n, _jaccard(grams, self._grams[n])) for n in sorted(numbers)]
        yield from sorted(
            (pair for pair in found if pair[1] >= THRESHOLD), key=lambda pair: -pair[1]
        )

    def _buckets_of(self, grams: frozenset[int]) -> Iterator[tuple[int, bytes]]:
        values = np.fromiter(grams, dtype=np.uint64, count=len(grams))
        # Multiply-shift hashing: the products are meant to overflow, their upper half is the hash.
        minima = ((self._factors * values + self._offsets) >> np.uint64(32)).min(axis=1)
        for band in range(_BANDS):
            yield band, minima[band * _ROWS : (band + 1) * _ROWS].tobytes()


class DuplicateGroups:
    """Groups of records that are joined by near-duplicates, directly or through others.

    All records are compared with each other, so what is kept of one is small: its grams (4 bytes
    each) and a key for each band.
    """

    def __init__(self) -> None:
        self._index = NearDuplicates()
        self._grams: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._parents: list[int] = []

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, record: Record, *, together_with: int | None = None) -> int:
        """Add a record; returns its number, from 0.

        Args:
            together_with: the number of a record that is in its group in any case.
        """
        grams = _grams(record)
        number = len(self)
        self._grams.append(np.fromiter(grams, dtype=np.uint32, count=len(grams)))
        keys = [zlib.crc32(bucket) for _, bucket in self._index._buckets_of(grams)]
        self._keys.append(np.array(keys, dtype=np.uint32))
        self._parents.append(number if together_with is None else self._root(together_with))
        return number

    def groups(self) -> list[list[int]]:
        """The numbers of the records of each group, in the order of their first records."""
        keys = np.array(self._keys).reshape(len(self), _BANDS)
        for band in keys.T:
            order = np.argsort(band, kind="stable")
            ends = np.flatnonzero(np.diff(band[order])) + 1
            for run in np.split(order, ends):
                if len(run) > 1:
                    self._join_similar(run.tolist())
        groups: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self)):
            groups[self._root(number)].append(number)
        return list(groups.values())

    def _join_similar(self, numbers: list[int]) -> None:
        """Join the groups of near-duplicates among some records."""
        for i, number in enumerate(numbers):
            grams: frozenset[int] | None = None
            for other in numbers[:i]:
                a, b = self._root(number), self._root(other)
                if a == b:
                    continue
                grams = grams or frozenset(self._grams[number].tolist())
                if _jaccard(grams, frozenset(self._grams[other].tolist())) >= THRESHOLD:
                    self._parents[max(a, b)] = min(a, b)

    def _root(self, number: int) -> int:
        while (parent := self._parents[number]) != number:
            self._parents[number] = number = self._parents[parent]
        return number


def between(records: Iterable[Record], others: Iterable[Record]) -> list[Duplicate]:
    """The records that have a near-duplicate among others, each with the most similar one."""
    index = NearDuplicates()
    for other in others:
        index.add(other)
    found = []
    for number, record in enumerate(records):
        for other_number, similarity in index.find(record):
            found.append(Duplicate(number, other_number, similarity))
            break
    return found


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


def _grams(record: Record) -> frozenset[int]:
    """The hashes of the 5-grams of a record's text; of the whole text if it is shorter."""
    texts = _leaves({key: value for key, value in record.items() if key != ANSWER})
    text = _IGNORED.sub("", "\n".join(texts)).casefold()
    parts = (text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1)))
    return frozenset(zlib.crc32(part.encode("utf-8", "surrogatepass")) for part in parts)


def _leaves(node: Tree) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for value in node.values():
            yield from _leaves(value)
