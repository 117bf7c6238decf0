"""The batches of one rank, from a token index and a plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from cpm_bee.data.batch import Batch, Pair, Stream, make_batch
from cpm_bee.data.in_context import InContextEncoder, InContextPlan
from cpm_bee.data.mixture import MixedIndex, MixedPlan
from cpm_bee.data.packing import PackedRow, Plan, micro_batches
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import AnswerState, EncodedRecord
from cpm_bee.engine import Engine
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.data_size import DataSize, StepShape, usable_lengths
from cpm_bee.train.prefetch import Batches, prefetch


@dataclass(frozen=True)
class PlannedStep:
    """One step of all ranks, and this rank's share of it."""

    epoch: int
    shares: list[list[int]]  # the records of each of this rank's batches
    num_batches: int  # of the rank with the most
    rows: int  # this and all below: over all ranks
    records: int
    tokens: int
    targets: int
    extension: list[Pair]  # the (id, sub > 0) pairs of all records, sorted
    # Of a mixture: the dataset of each share, and the targets of each dataset over all ranks.
    share_parts: Sequence[int] = ()
    part_targets: Sequence[int] = ()
    # This rank's records that have in-context samples, encoded with them, by number.
    with_samples: dict[int, EncodedRecord] = field(default_factory=dict, compare=False)


class DataLoader:
    """The batches of a data set for one rank.

    Args:
        rows, max_length, drop_last, shuffle_seed, in_context: see `StepShape`.
        accumulate: the number of micro-batches in a step, each with the same share of its rows.
        max_tokens: the most tokens in a batch; larger micro-batches are split, and a longer record
            is a batch of its own.
        as_generated: use the tokens and candidates of generation, for evaluation.

    Raises:
        InputError: as `DataSize.of`.
    """

    def __init__(
        self,
        index: TokenIndex | MixedIndex,
        tokenizer: Tokenizer,
        engine: Engine,
        *,
        rows: int,
        max_length: int,
        accumulate: int = 1,
        max_tokens: int | None = None,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
        as_generated: bool = False,
        in_context: tuple[float, ...] = (),
    ) -> None:
        self._index = index
        self.tokenizer = tokenizer
        self._engine = engine
        self._rows = rows
        self._max_length = max_length
        self._accumulate = accumulate
        self._max_tokens = max_tokens
        self._drop_last = drop_last
        self._seed = shuffle_seed
        self._as_generated = as_generated
        lengths = usable_lengths(index.lengths, index.answers, max_length)
        shape = StepShape(rows, max_length, drop_last, shuffle_seed, in_context)
        self.settings = shape.settings(index.dataset.fingerprint)
        self.tokens_per_step = shape.tokens
        self.size = DataSize.of(index.dataset.folder, index.lengths, index.answers, shape)
        self._samples = samples = shape.samples(lengths, index)
        self._encoder = None if samples is None else InContextEncoder(index, tokenizer)
        if samples is not None:
            self.size = self.size.with_samples(samples.draw(0), shape)
        self._plan: Plan | MixedPlan | InContextPlan
        seed = shuffle_seed or 0
        if isinstance(index, MixedIndex):
            plan = MixedPlan(
                index, lengths, rows=rows, max_length=max_length, seed=seed, samples=samples
            )
            self._plan = plan
            self.size = self.size.mixed(plan.drawn(0), self.lengths(0), shape)
        elif samples is not None:
            self._plan = InContextPlan(samples, rows=rows, max_length=max_length, seed=seed)
        else:
            self._plan = Plan(lengths, rows=rows, max_length=max_length, shuffle_seed=shuffle_seed)

    @property
    def num_targets(self) -> np.ndarray:
        """The number of targets of each record, with or without in-context samples."""
        return self._index.num_targets

    def lengths(self, epoch: int) -> np.ndarray:
        """The number of tokens of each record, with its in-context samples in an epoch."""
        return self._index.lengths if self._samples is None else self._samples.draw(epoch).lengths

    @property
    def part_names(self) -> list[str]:
        """The datasets of a mixture; empty if this is none."""
        return self._index.names if isinstance(self._index, MixedIndex) else []

    @property
    def num_records(self) -> int:
        """The number of records in an epoch: those that have an answer and fit into a row."""
        return self.size.num_records

    def record(self, number: int) -> Record:
        return self._index.source(number)

    def used_lengths(self) -> np.ndarray:
        """The lengths in tokens of the records of an epoch, without in-context samples.

        int [num_records]
        """
        index = self._index
        lengths = usable_lengths(index.lengths, index.answers, self._max_length)
        return lengths[lengths <= self._max_length]

    def is_writable(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns whether generation can write each record's answer, bool [len(numbers)]."""
        return (self._index.answers[numbers] & AnswerState.WRITABLE) > 0

    def unwritable_answers(self, most: int = 3) -> list[str]:
        """Describes the first `most` records whose answers cannot be generated, and why."""
        states = self._index.answers & (AnswerState.KNOWN | AnswerState.WRITABLE)
        numbers = np.flatnonzero(states == AnswerState.KNOWN)[:most].tolist()
        return [self._index.unwritable_answer(number) for number in numbers]

    def batches(
        self, epoch: int, done: int = 0
    ) -> Generator[tuple[PlannedStep, Batches], None, None]:
        """Yields the steps of an epoch (from 0) after the first `done`, with this rank's batches.

        Collective. Every rank gets the same steps, with the same number of batches. Beyond its own
        shares a rank gets None or, if all ranks must run the same number of passes
        (`Engine.lockstep`), a filler batch, whose loss must not count.
        """
        return prefetch(self._steps(epoch, done), self._make, self._engine.device)

    def _steps(self, epoch: int, done: int) -> Iterator[PlannedStep]:
        engine = self._engine
        streams = range(engine.rank, self._rows, engine.world_size)
        planned = islice(self._plan.steps(epoch, streams), done, None)
        nothing: list[PackedRow] = [[] for _ in streams]
        while True:
            step = self._exchange(epoch, next(planned, nothing))  # others may have more rows
            if step.rows < (self._rows if self._drop_last else 1):
                return
            yield step

    def _exchange(self, epoch: int, rows: list[PackedRow]) -> PlannedStep:
        """Combine the figures of a step over the ranks, each of which knows only its own rows."""
        index = self._index
        lengths = self.lengths(epoch)
        shares = self._shares(rows, lengths)
        numbers = [number for share in shares for number in share]
        parts: list[int] = []
        if isinstance(index, MixedIndex):
            parts = [int(index.part_of(share)[0]) for share in shares]
        targets_of = [int(index.num_targets[s].sum(dtype=np.int64)) for s in shares]
        sums = self._engine.reduce(
            [
                sum(1 for row in rows if row),
                len(numbers),
                int(lengths[numbers].sum(dtype=np.int64)),
                sum(targets_of),
                *(
                    sum(n for n, part in zip(targets_of, parts, strict=True) if part == wanted)
                    for wanted in range(len(self.part_names))
                ),
            ]
        )
        with_samples: dict[int, EncodedRecord] = {}
        if self._encoder is None or self._samples is None:
            own, pairs_of = index.largest_subs(numbers), index.extension_pairs
        else:
            draw = self._samples.draw(epoch)
            with_samples = self._encoder.encode(numbers, draw, self._rng_of(epoch))
            own = self._encoder.largest_subs(numbers, with_samples)
            pairs_of = self._encoder.extension_pairs
        num_batches, *subs = self._engine.reduce_max([len(shares), *own])
        num_rows, records, tokens, targets, *part_targets = map(int, sums)
        return PlannedStep(
            epoch,
            shares,
            num_batches,
            num_rows,
            records,
            tokens,
            targets,
            pairs_of(subs),
            parts,
            part_targets,
            with_samples,
        )

    def _shares(self, rows: list[PackedRow], lengths: np.ndarray) -> list[list[int]]:
        shares: list[list[int]] = []
        for i in range(self._accumulate):
            numbers = [n for row in rows[i :: self._accumulate] for n in row]
            for own in self._index.split(numbers) if self.part_names else [numbers]:  # type: ignore[union-attr]
                shares += micro_batches(own, lengths[own].tolist(), self._max_tokens)
        return shares

    def _rng_of(self, epoch: int) -> Callable[[int], random.Random]:
        # One generator per record: answers are shuffled the same way on any number of ranks.
        return lambda number: random.Random(f"{self._seed}/{epoch}/{number}")

    def _make(self, step: PlannedStep) -> list[Batch | None]:
        rng_of = self._rng_of(step.epoch)
        batches: list[Batch | None] = [
            make_batch(
                self._stream(share, step.with_samples, rng_of),
                self.tokenizer,
                step.extension,
                as_generated=self._as_generated,
            )
            for share in step.shares
        ]
        missing = step.num_batches - len(batches)
        return batches + [self._filler if missing and self._engine.lockstep else None] * missing

    def _stream(
        self,
        share: list[int],
        with_samples: dict[int, EncodedRecord],
        rng_of: Callable[[int], random.Random],
    ) -> Stream:
        if self._encoder is not None and with_samples:
            return self._encoder.stream(share, with_samples, rng_of)
        shuffle = None if self._seed is None else rng_of
        return self._index.stream(share, shuffle, as_generated=self._as_generated)

    @cached_property
    def _filler(self) -> Batch:
        """A batch of the shortest record."""
        shortest = [int(self._index.lengths.argmin())]
        extension = self._index.extension_pairs(self._index.largest_subs(shortest))
        return make_batch(self._index.stream(shortest), self.tokenizer, extension)
