"""In-context samples in training (`--incontext-weights`, docs/format.md §5.5).

Every record comes once an epoch as the record that is learned. With probability `weights[k]`, k
other records of its dataset follow it as its in-context samples, drawn without repetition. They
share its row, so its length is that of all of them. Samples are taken in the order in which they
are drawn; the first one that would make the record too long, and those after it, are left out.

All of this follows from seed, epoch and the lengths of the records. So every rank draws the same
samples without communication, a resumed run those of an uninterrupted one, and the plan of an epoch
is made from the lengths as without samples (`InContextPlan`).

What cannot be known from lengths is how the entries of the extension are numbered: a record and its
samples share one extension table. Records with samples are therefore encoded anew
(`InContextEncoder`), when their step is planned, since all ranks need the step's pairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpm_bee.data.batch import Pair, Stream, pairs_up_to
from cpm_bee.data.packing import PackedRow, Plan, generator
from cpm_bee.encoding import MAX_PARTS, EncodedRecord, Encoder
from cpm_bee.records import Record
from cpm_bee.segments import MAX_SEGMENTS
from cpm_bee.tokenizer import Tokenizer

RngOf = Callable[[int], random.Random]


@dataclass(frozen=True)
class Draw:
    """The in-context samples of all R records in one epoch.

    Attributes:
        lengths: the number of tokens of each record with its samples, [R].
        num_shortened: the records that have fewer samples than were drawn for them.
    """

    lengths: np.ndarray
    num_shortened: int
    _records: np.ndarray  # the n records that have samples, sorted
    _samples: np.ndarray  # (n, most samples) the number of each sample, -1 where there is none

    def samples_of(self, number: int) -> list[int]:
        """The numbers of a record's samples, in their order."""
        at = int(np.searchsorted(self._records, number))
        if at == len(self._records) or self._records[at] != number:
            return []
        return [n for n in self._samples[at].tolist() if n >= 0]

    def counts(self) -> list[int]:
        """How many records have 1, 2, ... samples."""
        per_record = (self._samples >= 0).sum(1)
        return np.bincount(per_record, minlength=self._samples.shape[1] + 1)[1:].tolist()


class InContextSamples:
    """Draws the in-context samples of each epoch.

    Args:
        weights: the probability of 0, 1, 2, ... samples.
        lengths: the number of tokens of each record, [R]; those longer than `max_length` are not
            used, neither as records nor as samples.
        num_segments: of each record, [R], where a record and its samples may have too many.
        starts: the number of the first record of each dataset, and R; samples come from the
            record's own dataset. None: there is one.
    """

    def __init__(
        self,
        weights: Sequence[float],
        lengths: np.ndarray,
        *,
        max_length: int,
        seed: int,
        num_segments: np.ndarray | None = None,
        starts: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self._thresholds = np.cumsum(weights)[:-1]
        self._lengths = lengths
        self._num_segments = np.zeros_like(lengths) if num_segments is None else num_segments
        # Of the whole extension table, which has at most one entry for each token.
        self._longest = min(max_length, MAX_PARTS)
        self._seed = seed
        bounds = [0, len(lengths)] if starts is None else [int(start) for start in starts]
        self._usable = [
            begin + np.flatnonzero(lengths[begin:end] <= max_length)
            for begin, end in itertools.pairwise(bounds)
        ]
        self._last: tuple[int, Draw] | None = None

    def draw(self, epoch: int) -> Draw:
        """The samples of an epoch, from 0; the last draw is kept."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = epoch, self._draw(epoch)
        return last[1]

    def _draw(self, epoch: int) -> Draw:
        parts = [self._draw_part(part, epoch) for part in range(len(self._usable))]
        records, wanted, samples = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        found = samples >= 0  # (n, most)
        lengths = self._lengths.astype(np.int64)
        lengths[records] += np.where(found, lengths[samples], 0).sum(1)
        has_some = found[:, 0]  # the first one is left out last
        return Draw(
            lengths,
            int(np.count_nonzero(found.sum(1) < wanted)),
            records[has_some],
            samples[has_some],
        )

    def _draw_part(self, part: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The n records of a dataset for which samples are drawn, how many [n], and which
        [n, most]; -1 where a sample is left out."""
        usable = self._usable[part]
        # `packing` and `mixture` have at most two numbers here.
        rng = generator(self._seed, epoch, part, 0, 0)
        wanted = np.searchsorted(self._thresholds, rng.random(len(usable)), side="right")
        own = np.flatnonzero(wanted)  # positions in `usable`, as all drawn ones
        wanted = wanted[own]
        samples = np.full((len(own), len(self._thresholds)), -1, dtype=np.int64)
        tokens = self._lengths[usable[own]].astype(np.int64)
        segments = self._num_segments[usable[own]].astype(np.int64)
        taken = own[:, None]  # (n, k + 1) sorted, so that no record comes twice
        fits = np.ones(len(own), dtype=np.bool_)
        for k in range(min(samples.shape[1], len(usable) - 1)):
            drawn = rng.integers(len(usable) - 1 - k, size=len(own))
            for column in taken.T:
                drawn += drawn >= column
            taken = np.sort(np.column_stack([taken, drawn]), axis=1)
            numbers = usable[drawn]
            tokens += self._lengths[numbers]
            segments += self._num_segments[numbers]
            fits &= (k < wanted) & (tokens <= self._longest) & (segments <= MAX_SEGMENTS)
            samples[fits, k] = numbers[fits]
        return usable[own], wanted, samples


class InContextPlan:
    """The rows of every row stream in every epoch; see `Plan`, which plans each epoch."""

    def __init__(self, samples: InContextSamples, *, rows: int, max_length: int, seed: int) -> None:
        self._samples = samples
        self._rows, self._max_length, self._seed = rows, max_length, seed

    def steps(self, epoch: int, row_streams: Sequence[int]) -> Iterator[list[PackedRow]]:
        plan = Plan(
            self._samples.draw(epoch).lengths,
            rows=self._rows,
            max_length=self._max_length,
            shuffle_seed=self._seed,
        )
        return plan.steps(epoch, row_streams)


class _Index(Protocol):
    """What is asked of a `TokenIndex` or a `MixedIndex`."""

    @property
    def extension_vocabulary(self) -> np.ndarray: ...

    def source(self, number: int) -> Record: ...

    def largest_subs(self, numbers: Sequence[int]) -> list[int]: ...

    def stream(self, numbers: Sequence[int], rng_of: RngOf | None = None) -> Stream: ...


class InContextEncoder:
    """Encodes records with their in-context samples; what has none is in the index."""

    def __init__(self, index: _Index, tokenizer: Tokenizer) -> None:
        self._index = index
        self._encoder = Encoder(tokenizer)
        # Two records may have a pair together that none has alone: any special token's.
        self._extension_ids = np.unique(np.array([*tokenizer.specials.values()], dtype=np.int64))

    def encode(self, numbers: Sequence[int], draw: Draw, rng_of: RngOf) -> dict[int, EncodedRecord]:
        """Those of some records that have samples, encoded with them.

        Args:
            rng_of: returns the generator that shuffles the answers of a record and its samples.
        """
        found = {}
        for number in dict.fromkeys(numbers):
            if own := draw.samples_of(number):
                samples = [self._index.source(n) for n in own]
                found[number] = self._encoder.encode(
                    self._index.source(number), rng=rng_of(number), samples=samples
                )
        return found

    def largest_subs(
        self, numbers: Sequence[int], encoded: Mapping[int, EncodedRecord]
    ) -> list[int]:
        """The largest sub of each id of any special token, with samples where there are some."""
        largest = np.zeros(len(self._extension_ids), dtype=np.int64)
        alone = [n for n in numbers if n not in encoded]
        places = np.searchsorted(self._extension_ids, self._index.extension_vocabulary)
        largest[places] = self._index.largest_subs(alone)
        for number in encoded:
            ids, subs = encoded[number].ids, encoded[number].subs
            at = np.flatnonzero(subs)
            np.maximum.at(largest, np.searchsorted(self._extension_ids, ids[at]), subs[at])
        return largest.tolist()

    def extension_pairs(self, largest_subs: Sequence[int]) -> list[Pair]:
        return pairs_up_to(self._extension_ids, largest_subs)

    def stream(
        self, numbers: Sequence[int], encoded: Mapping[int, EncodedRecord], rng_of: RngOf
    ) -> Stream:
        """The tokens of some records of one dataset: first of those without samples."""
        parts = []
        if alone := [n for n in numbers if n not in encoded]:
            parts.append(self._index.stream(alone, rng_of))
        if others := [encoded[n] for n in numbers if n in encoded]:
            parts.append(Stream.of(others))
        return Stream.joined(parts)
