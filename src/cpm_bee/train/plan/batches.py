"""The batches of a run that decide its memory and its time, from the lengths of its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cpm_bee.data.batch import Batch
from cpm_bee.data.packing import Plan, micro_batches
from cpm_bee.train.data_size import DataSurvey, StepShape
from cpm_bee.train.memory_estimate import typical_batch

_MOST_STEPS = 1000  # to look at

Micro = list[int]  # the records of a micro-batch


@dataclass(frozen=True)
class PlannedBatches:
    """The micro-batches of one rank in steps of a data set.

    Attributes:
        steps: the records of each micro-batch of each step.
    """

    survey: DataSurvey
    vocab_size: int
    steps: list[list[Micro]]
    as_generated: bool = False

    @classmethod
    def of(
        cls,
        survey: DataSurvey,
        shape: StepShape,
        vocab_size: int,
        *,
        processes: int,
        accumulate: int = 1,
        max_tokens: int | None = None,
        max_steps: int | None = None,
        as_generated: bool = False,
    ) -> PlannedBatches:
        """Plan the first steps as `DataLoader` does; at least one record must fit into a row."""
        lengths = survey.lengths
        plan = Plan(
            lengths, rows=shape.rows, max_length=shape.max_length, shuffle_seed=shape.shuffle_seed
        )
        planned = plan.steps(0, range(0, shape.rows, processes))
        steps = []
        for rows in islice(planned, min(_MOST_STEPS, max_steps or _MOST_STEPS)):
            micros: list[Micro] = []
            for i in range(accumulate):
                own = [number for row in rows[i::accumulate] for number in row]
                micros += micro_batches(own, lengths[own].tolist(), max_tokens)
            steps.append(micros)
        return cls(survey, vocab_size, steps, as_generated)

    @property
    def micros(self) -> list[Micro]:
        return [micro for step in self.steps for micro in step]

    def batch(self, micro: Sequence[int]) -> Batch:
        numbers = list(micro)
        return typical_batch(
            self.survey.lengths[numbers].tolist(),
            self.survey.num_targets[numbers].tolist(),
            self.vocab_size,
            num_pairs=self.survey.num_pairs,
            as_generated=self.as_generated,
        )

    def tokens(self, micro: Sequence[int]) -> int:
        return int(self.survey.lengths[list(micro)].sum(dtype=np.int64))

    def heaviest(self, most: int = 4) -> list[list[Batch]]:
        """The steps with the largest micro-batches: by tokens, by attention, by targets.

        The first step comes first, as memory that is kept depends on the order.
        """
        lengths, targets = self.survey.lengths.astype(np.int64), self.survey.num_targets
        costs = [
            lambda micro: lengths[micro].sum(),
            lambda micro: (lengths[micro] ** 2).sum(),
            lambda micro: targets[micro].sum(),
        ]
        chosen = [0]
        for cost in costs:
            sizes = [max((cost(micro) for micro in step), default=0) for step in self.steps]
            chosen.append(int(np.argmax(sizes)))
        steps = [self.steps[i] for i in dict.fromkeys(chosen)][:most]
        return [[self.batch(micro) for micro in self._largest(step)] for step in steps]

    def _largest(self, step: list[Micro]) -> list[Micro]:
        """At most three micro-batches of a step: more of them take no more memory."""
        if len(step) <= 3:
            return step
        order = sorted(range(len(step)), key=lambda i: -self.tokens(step[i]))[:3]
        return [step[i] for i in sorted(order)]

    def typical(self) -> Batch:
        """The micro-batch of median size."""
        micros = sorted(self.micros, key=self.tokens)
        return self.batch(micros[len(micros) // 2])

    def tokens_per_step(self) -> float:
        """The mean over the steps."""
        return sum(map(self.tokens, self.micros)) / len(self.steps)
