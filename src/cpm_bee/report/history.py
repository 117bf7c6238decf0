"""What the report knows of a run: the events of its log, in little memory."""

from __future__ import annotations

import math
from array import array
from typing import Any

from cpm_bee.train.training_state import order

_COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second")
_EVALUATION = ("step", "loss", "token_accuracy", "exact_match", "records")
POINTS = 400  # of a curve; more cannot be told apart


class History:
    """The events of a run.

    Attributes:
        columns: the fields of all steps by name; NaN where the log has null.
        evaluations, samples: the events of these kinds.
        start, end: the latest of these kinds; `end` is None while the run goes on.
    """

    def __init__(self) -> None:
        self.columns = {name: array("d") for name in _COLUMNS}
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self.epoch = 0

    def add(self, event: dict[str, Any]) -> None:
        """Add an event of the log; kinds that are unknown are left out.

        The log of an earlier version, or one that somebody has changed, may lack fields.
        """
        kind = event["event"]
        if kind == "train" and _is_number(event.get("step")):
            self.epoch = event.get("epoch", 0)
            for name, column in self.columns.items():
                column.append(event[name] if _is_number(event.get(name)) else math.nan)
        elif kind == "eval":
            if all(_is_number(event.get(name)) for name in _EVALUATION):
                self.evaluations.append(event)
        elif kind == "samples":
            self.samples.append(event)
        elif kind == "start":
            self.start, self.end = event, None
        elif kind == "end":
            self.end = event

    @property
    def num_steps(self) -> int:
        return len(self.columns["step"])

    @property
    def step(self) -> int:
        """The last step; 0 before the first one."""
        return int(self.columns["step"][-1]) if self.num_steps else 0

    @property
    def seconds(self) -> float:
        """The time that all steps took, without evaluations."""
        tokens, speed = self.columns["tokens"], self.columns["tokens_per_second"]
        return sum(t / s for t, s in zip(tokens, speed, strict=True) if t > 0 and s > 0)

    @property
    def tokens(self) -> int:
        return int(sum(count for count in self.columns["tokens"] if count > 0))

    def best(self, metric: str) -> dict[str, Any] | None:
        """The best evaluation so far; the first of equal ones."""
        keys = [order(e["loss"], e["exact_match"], metric) for e in self.evaluations]
        return self.evaluations[keys.index(max(keys))] if keys else None

    def thinned(self, *names: str, limit: int = POINTS) -> dict[str, list[float]]:
        """Columns with at most `limit` values, each the mean of neighbours without NaN."""
        size = max(1, -(-self.num_steps // limit))
        starts = range(0, self.num_steps, size)
        return {
            name: [_mean(self.columns[name][start : start + size]) for start in starts]
            for name in names
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _mean(values: array[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
