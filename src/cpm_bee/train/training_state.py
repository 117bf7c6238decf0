"""The progress of a run, which a saved training state holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOSS, EXACT_MATCH = METRICS = ("loss", "exact_match")  # --metric-for-best
GAINS = {LOSS: "a lower loss", EXACT_MATCH: "a higher exact match"}


@dataclass
class TrainingState:
    """The progress of a run. Resuming needs only this and the engine's state."""

    step: int = 0  # finished steps of this run
    epoch: int = 0
    step_in_epoch: int = 0
    records_in_epoch: int = 0
    best_loss: float = math.inf  # this and the next: of the best evaluation
    best_exact_match: float = -1.0
    evaluations_without_gain: int = 0
    evaluated_step: int = -1
    saved_step: int = -1

    def add_evaluation(self, loss: float, exact_match: float, metric: str) -> bool:
        """Note the figures of an evaluation after `step`; returns whether it is the best so far."""
        self.evaluated_step = self.step
        before = (self.best_loss, self.best_exact_match)
        is_best = order(loss, exact_match, metric) > order(*before, metric)
        if is_best:
            self.best_loss, self.best_exact_match = loss, exact_match
        self.evaluations_without_gain = 0 if is_best else self.evaluations_without_gain + 1
        return is_best

    def forget_best(self) -> None:
        """Have the next evaluation be the best one."""
        fresh = TrainingState()
        self.best_loss, self.best_exact_match = fresh.best_loss, fresh.best_exact_match
        self.evaluated_step, self.evaluations_without_gain = -1, 0


def order(loss: float, exact_match: float, metric: str) -> tuple[float, ...]:
    """A key that is larger for a better evaluation.

    Of evaluations with the same exact match, which often has few values, the lower loss is better.
    """
    return (-loss,) if metric == LOSS else (exact_match, -loss)
