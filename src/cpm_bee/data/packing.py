"""Which records make up which step: a function of lengths, seed, epoch and the rows of a step.

Row i of every step comes from *row stream* i. A row stream owns its share of the records and packs
them by itself, so that a rank plans its own row streams alone, at a cost that does not depend on
the number of ranks, and no pass over all records is needed at the start of an epoch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, tee, zip_longest

import numpy as np

PackedRow = list[int]  # numbers of the records that share a row of max_length tokens

WINDOW = 32  # records that a row stream looks ahead to fill a row
_CHUNK = 1024  # records of a row stream whose positions are computed at once
_ROUNDS = 8
_MASK = 2**64 - 1


def pack(numbers: Iterable[int], lengths: Iterable[int], max_length: int) -> Iterator[PackedRow]:
    """Fill one row after the other from the next `WINDOW` records.

    A row takes records as they come while the window is not enough to fill it, and then those of
    the window that fill it best. The oldest record is always taken, so that none waits for more
    than `WINDOW` rows.

    Args:
        numbers: the records in the order they enter.
        lengths: the tokens of each of them, from 1 to `max_length`.
    """
    source = zip(numbers, lengths, strict=True)
    window = list(islice(source, WINDOW))
    waiting = sum(length for _, length in window)
    while window:
        row: PackedRow = []
        space = max_length
        while window and (not row or waiting <= space):
            number, length = window.pop(0)
            row.append(number)
            space -= length
            waiting -= length
            for entering in islice(source, 1):
                window.append(entering)
                waiting += entering[1]
        taken = best_subset([length for _, length in window], space)
        row += [window[i][0] for i in taken]
        for i in reversed(taken):
            waiting -= window.pop(i)[1]
        new = list(islice(source, WINDOW - len(window)))
        window += new
        waiting += sum(length for _, length in new)
        yield row


def best_subset(lengths: Sequence[int], space: int) -> list[int]:
    """The positions of lengths whose sum is the largest up to `space`; of equals, early ones."""
    # Bit s of sums[i] says that some of the first i lengths have the sum s.
    sums = [1]
    for length in lengths:
        if sums[-1] >> space:
            break
        sums.append((sums[-1] | sums[-1] << length) & ((2 << space) - 1))
    best = sums[-1].bit_length() - 1
    taken = []
    for i in range(len(sums) - 2, -1, -1):
        if not sums[i] >> best & 1:
            taken.append(i)
            best -= lengths[i]
    return taken[::-1]


def permuted(positions: np.ndarray, size: int, keys: Sequence[int]) -> np.ndarray:
    """Where a pseudo-random permutation of 0 … size - 1 sends some of its positions, int64.

    A Feistel cipher over a x b >= size pairs, each round adding a hash of one half to the other;
    results outside are sent on until they are inside (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002, methods 2 and 3).

    Args:
        keys: one 64-bit number a round.
    """
    a = math.isqrt(max(size - 1, 0)) + 1
    b = -(-size // a)
    result = positions.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        right, left = np.divmod(result[outside], np.uint64(a))
        for i, key in enumerate(keys):
            if i % 2:
                right = (right + _hash(left, key)) % np.uint64(b)
            else:
                left = (left + _hash(right, key)) % np.uint64(a)
        result[outside] = right * np.uint64(a) + left
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _hash(values: np.ndarray, key: int) -> np.ndarray:
    """Well mixed uint64 below 2**62: sums cannot overflow. (The finaliser of splitmix64.)"""
    x = values + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(2)


def _keys(seed: int, epoch: int, *stream: int) -> list[int]:
    # Negative numbers are refused; two's complement keeps such a seed apart from others.
    entropy = [seed & _MASK, epoch, len(stream), *stream]
    return [int(k) for k in np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)]


def micro_batches(
    numbers: Sequence[int], lengths: Sequence[int], max_tokens: int | None
) -> list[list[int]]:
    """Split records into balanced parts of at most `max_tokens`; a longer record stands alone.

    The longest record first, each to the part with the fewest tokens; records of a part keep
    their order.
    """
    if max_tokens is None or sum(lengths) <= max_tokens:
        return [list(numbers)] if len(numbers) else []
    longest_first = sorted(range(len(numbers)), key=lambda i: -lengths[i])
    count = -(-sum(min(n, max_tokens) for n in lengths) // max_tokens)
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        sums = [(0, i) for i in range(count)]
        for i in longest_first:
            tokens, part = sums[0]
            parts[part].append(i)
            heapq.heapreplace(sums, (tokens + lengths[i], part))
        if all(len(parts[p]) == 1 or tokens <= max_tokens for tokens, p in sums):
            return [[numbers[i] for i in sorted(part)] for part in parts]
        count += 1


class Plan:
    """The rows of every stream in every epoch of a training run; every record is in one of them.

    Args:
        lengths: tokens of each record; longer ones than `max_length` are left out.
        rows: rows of a step, over all ranks and micro-steps: the number of row_streams.
        shuffle_seed: None keeps the dataset's order, as evaluation does.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        rows: int,
        max_length: int,
        shuffle_seed: int | None = None,
    ) -> None:
        self._lengths = lengths
        self._rows = rows
        self._max_length = max_length
        self._seed = shuffle_seed
        self._order = np.flatnonzero(lengths <= max_length)
        if shuffle_seed is not None:
            self._order = self._order[_longest_first(lengths[self._order])]
        if len(lengths) < 2**31:
            self._order = self._order.astype(np.int32)
        self.num_records = len(self._order)

    def steps(self, epoch: int, row_streams: Sequence[int]) -> Iterator[list[PackedRow]]:
        """The rows of some row streams in each step of an epoch (from 0) until all have ended.

        The row of a row stream that has ended is empty.
        """
        rows = zip_longest(
            *(self.row_stream(epoch, stream) for stream in row_streams), fillvalue=[]
        )
        return map(list, rows)

    def row_stream(self, epoch: int, stream: int) -> Iterator[PackedRow]:
        """The rows of a row stream in an epoch."""
        first, second = tee(self._chunks(epoch, stream))
        numbers = chain.from_iterable(chunk.tolist() for chunk in first)
        lengths = chain.from_iterable(self._lengths[chunk].tolist() for chunk in second)
        return pack(numbers, lengths, self._max_length)

    def _chunks(self, epoch: int, stream: int) -> Iterator[np.ndarray]:
        """The records of a row stream in their order, some at a time."""
        # The records stand in groups of one for each stream. Sorted by length, the records of a
        # group are about equally long, so that all row streams have about the same number of tokens
        # and end at about the same step. A row stream takes the groups in an order of its own.
        groups, rest = divmod(self.num_records, self._rows)
        if self._seed is None:
            count = groups + (stream < rest)
            for positions in _ranges(count):
                yield self._order[positions * self._rows + stream]
            return
        (turn, *_), keys = _keys(self._seed, epoch), _keys(self._seed, epoch, stream)

        def member(group: np.ndarray) -> np.ndarray:
            turns = _hash(group.astype(np.uint64), turn) + np.uint64(stream)
            return (turns % np.uint64(self._rows)).astype(np.int64)

        count = groups + int(member(np.array([groups]))[0] < rest)
        for positions in _ranges(count):
            group = permuted(positions, count, keys)
            yield self._order[group * self._rows + member(group)]


def _ranges(count: int) -> Iterator[np.ndarray]:
    for begin in range(0, count, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, count))


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The order of descending lengths, the same on every machine (equals keep their order)."""
    keys = -lengths.astype(np.int64) if len(lengths) else lengths
    if len(lengths) and lengths.max() <= np.iinfo(np.uint16).max:
        keys = (lengths.max() - lengths).astype(np.uint16)  # sorted in linear time
    return np.argsort(keys, kind="stable")
