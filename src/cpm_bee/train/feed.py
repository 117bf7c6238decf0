"""From a token index and a plan to the batches of one rank."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from cpm_bee.data.batch import Batch, collate
from cpm_bee.data.index import TokenIndex
from cpm_bee.data.planning import Plan, Step
from cpm_bee.engine import Engine
from cpm_bee.errors import InputError
from cpm_bee.tokenizer import Tokenizer


class Feed:
    """The batches of a data set for one rank.

    Args:
        rows: rows of `max_length` tokens of a step, over all ranks and micro-steps.
        shuffle_seed: of the order and of shuffled answers; None keeps both, as evaluation does.

    Raises:
        InputError: the data set is empty, or no record fits into `max_length`.
    """

    def __init__(
        self,
        index: TokenIndex,
        tokenizer: Tokenizer,
        engine: Engine,
        *,
        rows: int,
        max_length: int,
        accumulate: int = 1,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._engine = engine
        self._accumulate = accumulate
        self._seed = shuffle_seed
        self._plan = Plan(
            index.lengths,
            rows=rows,
            max_length=max_length,
            drop_last=drop_last,
            shuffle_seed=shuffle_seed,
        )
        # What makes the plan: with other values, a step of it is another one.
        self.settings = {
            "records of --dataset": index.dataset.fingerprint,
            "rows of a step (--batch-size, --accumulate, processes)": rows,
            "--max-length": max_length,
            "--drop-last": drop_last,
            "--seed": shuffle_seed,
        }
        self.capacity = rows * max_length
        self.num_too_long = int(np.count_nonzero(index.lengths > max_length))
        self.num_records = len(index) - self.num_too_long
        if self.num_records == 0:
            longest = f" (the longest has {index.lengths.max()} tokens)" if len(index) else ""
            raise InputError(
                f"{index.dataset.folder}: none of its {len(index)} records fits into --max-length "
                f"{max_length}{longest}"
            )

    def epoch(self, epoch: int) -> Iterator[Step]:
        return self._plan.epoch(epoch)

    def num_steps(self, epoch: int) -> int:
        return sum(1 for _ in self.epoch(epoch))

    def num_targets(self, step: Step) -> int:
        """The targets of a step on all ranks, from the index alone."""
        return int(self._index.num_targets[step.numbers].sum())

    def num_tokens(self, step: Step) -> int:
        """The tokens of a step on all ranks, from the index alone."""
        return int(self._index.lengths[step.numbers].sum())

    def micro_batches(self, step: Step, epoch: int) -> Iterator[Batch | None]:
        """This rank's batches of a step, one a micro-step; None where it has no records."""
        engine = self._engine
        extension = self._index.extension_pairs(step.numbers)
        for numbers in step.micro_steps(engine.rank, engine.world_size, self._accumulate):
            if not numbers:
                yield None
                continue
            records = [self._index.record(n, self._rng(epoch, n)) for n in numbers]
            yield collate(records, self._tokenizer, extension).to(engine.device)

    def _rng(self, epoch: int, number: int) -> random.Random | None:
        # A record's own generator: its answer is shuffled alike on any number of ranks.
        return None if self._seed is None else random.Random(f"{self._seed}/{epoch}/{number}")
