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
