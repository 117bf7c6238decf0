"""The time of a run, from measured parts of it."""

from __future__ import annotations

from typing import NamedTuple

from cpm_bee.train.options import Options
from cpm_bee.train.plan.measurement import Measured

_PHASES = ("start", "loading", "training", "evaluation", "saving")


class RunTime(NamedTuple):
    """Seconds. `step` is a training step, `pass_` an evaluation of the whole set."""

    start: float
    loading: float
    step: float
    pass_: float
    training: float
    evaluation: float
    saving: float
    step_cpu: float
    pass_cpu: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in _PHASES)


def number_of(total: int, interval: int) -> int:
    """How often something is done that is done at the begin, every `interval` steps, at the end."""
    return 1 + -(-total // interval)


def run_time(
    options: Options,
    measured: Measured,
    *,
    steps: int,
    step_tokens: float,
    evaluation_tokens: float,
    weights: int,
    saved: int,
) -> RunTime | None:
    """Returns the time of a run; None where no step could be measured.

    Args:
        step_tokens: of one process in a step.
        evaluation_tokens: of one process in an evaluation; 0 without one.
        weights: bytes that are loaded.
        saved: bytes that are written each time that a state is saved.
    """
    if measured.step is None:
        return None
    part = measured.step
    step = part.train * step_tokens / part.tokens
    pass_ = part.evaluate * evaluation_tokens / part.tokens
    evaluations = number_of(steps, options.eval_interval)
    saves = number_of(steps, options.save_interval or options.eval_interval)
    return RunTime(
        start=measured.start,
        loading=weights / measured.read_rate if measured.read_rate else 0.0,
        step=step,
        pass_=pass_,
        training=steps * step,
        evaluation=evaluations * pass_,
        saving=saves * saved / measured.save_rate,
        step_cpu=part.train_cpu * step_tokens / part.tokens,
        pass_cpu=part.evaluate_cpu * evaluation_tokens / part.tokens,
    )


def duration(seconds: float) -> str:
    """Seconds for people: `12 s`, `3 min`, `1 h 20 min`, `2 days 3 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
