"""Packing: plans the records of each step from lengths, seed, epoch and rows per step.

A step has a fixed number of rows of `max_length` tokens; a row contains whole records. Row i of
every step comes from *row stream* i, which packs its own share of the records. A rank plans only
its own row streams, independently of other ranks, so the plan is the same for any number of ranks
and workers.

Records are sorted by length and cut into groups with one record for each row stream. The records of
a group have similar lengths, so all row streams have about the same number of tokens and end at
about the same step. In every epoch the records of each group are assigned to row streams anew, and
each row stream takes its records in its own random order. It fills rows one by one with the best
fitting subset of a window of the next records (`pack`), which leaves about 1 % of a row empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest

import numpy as np

PackedRow = list[int]  # numbers of the records that share a row of max_length tokens

# Increment this when a rule below changes, so that no run is resumed with another plan.
PLAN_VERSION = 2
WINDOW = 32  # records that a row stream looks ahead to fill a row


def pack(numbers: Iterable[int], lengths: Iterable[int], max_length: int) -> Iterator[PackedRow]:
    """Pack records into rows, each filled from the next `WINDOW` records.

    A row takes records in order while all of the window fits into it, and then the subset of the
    window that fills it best. It always takes the oldest record, so that no record waits for more
    than `WINDOW` rows.

    Args:
        numbers: the numbers of the records, in order.
        lengths: the number of tokens of each, from 1 to `max_length`.
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
    """The positions of the lengths with the largest sum up to `space`; prefers early ones."""
    # Bit s of sums[i] is set if a subset of the first i lengths has the sum s.
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


def micro_batches(
    numbers: Sequence[int], lengths: Sequence[int], max_tokens: int | None
) -> list[list[int]]:
    """Split records into balanced parts of at most `max_tokens`; a longer record is its own part.

    The records, longest first, are assigned to the part with the fewest tokens; the records of a
    part keep their order.
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
    """The rows of every row stream in every epoch; each record is in one row per epoch.

    Args:
        lengths: the number of tokens of each record; records longer than `max_length` are left out.
        rows: rows per step over all ranks and micro-batches: the number of row streams.
        shuffle_seed: None keeps the dataset's order, as in evaluation.
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
        """Yields the rows of some row streams, step by step, until all have ended.

        The row of a row stream that has ended is empty. Epochs count from 0.
        """
        rows = zip_longest(
            *(self.row_stream(epoch, stream) for stream in row_streams), fillvalue=[]
        )
        return map(list, rows)

    def row_stream(self, epoch: int, stream: int) -> Iterator[PackedRow]:
        """The rows of a row stream in an epoch."""
        numbers = self._records(epoch, stream)
        # Iterating over a memoryview yields Python integers, without a list of all of them.
        return pack(numbers.data, self._lengths[numbers].data, self._max_length)

    def _records(self, epoch: int, stream: int) -> np.ndarray:
        """The records of a row stream, in its order."""
        if self._seed is None:
            return self._order[stream :: self._rows].copy()
        groups, rest = divmod(self.num_records, self._rows)
        # The member of each group that belongs to this stream: streams are assigned cyclically,
        # starting at a random member of each group. The last group may have fewer members.
        turns = generator(self._seed, epoch).integers(self._rows, size=groups + 1)
        members = (turns + stream) % self._rows
        count = groups + int(members[-1] < rest)
        order = generator(self._seed, epoch, stream).permutation(count)
        return self._order[order * self._rows + members[order]]


def generator(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    """The random numbers of a purpose, which follow from its numbers alone."""
    # NumPy refuses negative numbers: two's complement maps each seed to another number. It ignores
    # trailing zeros, so the length of `stream` tells sequences apart.
    entropy = [seed & (2**64 - 1), epoch, len(stream), *stream]
    return np.random.Generator(np.random.PCG64(entropy))


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The order of descending lengths; stable, so the same on every machine."""
    keys = -lengths.astype(np.int64) if len(lengths) else lengths
    if len(lengths) and lengths.max() <= np.iinfo(np.uint16).max:
        keys = (lengths.max() - lengths).astype(np.uint16)  # sorted in linear time
    return np.argsort(keys, kind="stable")
