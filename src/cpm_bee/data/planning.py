"""Which records make up which step: a function of the lengths, the seed and the epoch alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Row = list[int]  # numbers of the records that share a row of max_length tokens


def best_fit(
    numbers: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    max_length: int,
) -> Iterator[list[Row]]:
    """Fill rows by the usual rule (SPEC §4) and yield them `batch_size` at a time, oldest first.

    A record goes to the open row with the least space that holds it, of equals the oldest, else a
    new row opens; the rest comes last.

    Args:
        numbers: the records in the order they enter.
        lengths: the tokens of each of them, none above `max_length`.
    """
    rows: dict[int, Row] = {}  # the open rows by age
    spaces: list[tuple[int, int]] = []  # (space left, age) of the open rows, sorted
    age = 0
    for number, length in zip(
        np.asarray(numbers).tolist(), np.asarray(lengths).tolist(), strict=True
    ):
        place = bisect_left(spaces, (length, -1))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = max_length, age
            rows[row] = []
            age += 1
        rows[row].append(number)
        insort(spaces, (space - length, row))
        if len(rows) > batch_size:
            oldest = list(rows)[:batch_size]
            yield [rows.pop(r) for r in oldest]
            spaces = [(s, r) for s, r in spaces if r in rows]
    if rows:
        yield list(rows.values())


class Step(NamedTuple):
    """The records of one step on all ranks."""

    rows: list[Row]

    @property
    def numbers(self) -> list[int]:
        return [number for row in self.rows for number in row]

    def micro_steps(self, rank: int, world_size: int, accumulate: int) -> list[list[int]]:
        """A rank's share as records of `accumulate` micro-steps; some may be empty.

        Every rank gets the same number of micro-steps, so that none waits for another.
        """
        own = self.rows[rank::world_size]
        return [[n for row in own[i::accumulate] for n in row] for i in range(accumulate)]


class Plan:
    """The steps of every epoch of a training run.

    Args:
        lengths: tokens of each record; longer ones than `max_length` are left out.
        rows: rows of a step, over all ranks and micro-steps.
        drop_last: leave out a last step with fewer rows.
        shuffle_seed: None keeps the dataset's order, as evaluation does.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        rows: int,
        max_length: int,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
    ) -> None:
        self._lengths = lengths
        self._usable = np.flatnonzero(lengths <= max_length)
        self._rows = rows
        self._max_length = max_length
        self._drop_last = drop_last
        self._seed = shuffle_seed

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch (from 0)."""
        order = self._usable
        if self._seed is not None:
            # A negative seed is refused by PCG64, two's complement keeps it apart from others.
            rng = np.random.Generator(np.random.PCG64([self._seed & 0xFFFFFFFFFFFFFFFF, epoch]))
            order = rng.permutation(order)
        for rows in best_fit(order, self._lengths[order], self._rows, self._max_length):
            if len(rows) == self._rows or not self._drop_last:
                yield Step(rows)
