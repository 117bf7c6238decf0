"""Plans which records make up each step: a function of lengths, seed, epoch and rows per step.

A step has so many rows of `max_length` tokens; a row holds whole records, one after the other. Row
i of every step comes from *row stream* i, which owns a share of the records and packs them by
itself: a rank plans its own row streams, independently of other ranks, and the plan is the
same for any number of ranks and workers.

Records are sorted by length and cut into groups of one record for each row stream. The records of a
group are about equally long, so all row streams have about as many tokens, and end at about the
same step. In every epoch the members of each group are dealt out again, and each row stream takes
its members in its own random order. It then fills one row after the other from a window of the
next records (`pack`), by the subset that fits best, which leaves about 1 % of a row empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest

import numpy as np

PackedRow = list[int]  # numbers of the records that share a row of max_length tokens

# Of the rules below: raise it when a plan changes, so that no run is resumed with another one.
PLAN_VERSION = 2
WINDOW = 32  # records that a row stream looks ahead to fill a row


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


def micro_batches(
    numbers: Sequence[int], lengths: Sequence[int], max_tokens: int | None
) -> list[list[int]]:
    """Split records into balanced parts of at most `max_tokens`; a longer record is a part itself.

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
        rows: rows of a step, over all ranks and micro-steps: the number of row streams.
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
        numbers = self._records(epoch, stream)
        # Going through a memoryview gives Python's integers, one at a time.
        return pack(numbers.data, self._lengths[numbers].data, self._max_length)

    def _records(self, epoch: int, stream: int) -> np.ndarray:
        """The records of a row stream in the order that it takes them."""
        if self._seed is None:
            return self._order[stream :: self._rows].copy()
        groups, rest = divmod(self.num_records, self._rows)
        # Which member of each group falls to this stream: the streams are dealt out in a circle
        # that begins elsewhere in every group. The last group may lack members.
        turns = _generator(self._seed, epoch).integers(self._rows, size=groups + 1)
        members = (turns + stream) % self._rows
        count = groups + int(members[-1] < rest)
        order = _generator(self._seed, epoch, stream).permutation(count)
        return self._order[order * self._rows + members[order]]


def _generator(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    # Negative numbers are refused; two's complement keeps such a seed apart from others. Each of
    # two sequences that begin alike is marked by its length: zeros at the end would not count.
    entropy = [seed & (2**64 - 1), epoch, len(stream), *stream]
    return np.random.Generator(np.random.PCG64(entropy))


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The order of descending lengths, the same on every machine (equals keep their order)."""
    keys = -lengths.astype(np.int64) if len(lengths) else lengths
    if len(lengths) and lengths.max() <= np.iinfo(np.uint16).max:
        keys = (lengths.max() - lengths).astype(np.uint16)  # sorted in linear time
    return np.argsort(keys, kind="stable")
