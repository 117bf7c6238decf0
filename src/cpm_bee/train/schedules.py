"""Learning-rate schedules (docs/format.md §8), one for all engines."""

from __future__ import annotations

import math

STYLES = ("constant", "linear", "cosine", "exponential", "noam")
EXPONENTIAL_DECAY = 0.95  # per step


def learning_rate(style: str, lr: float, step: int, warmup: int, end: int) -> float:
    """Returns the learning rate of the step that follows `step` finished ones.

    Args:
        style: one of `STYLES`.
        lr: the base learning rate.
        warmup: the number of warm-up steps.
        end: the step at which linear and cosine reach 0; they stay there.
    """
    if style == "noam":
        if step < warmup:
            return lr / math.sqrt(warmup) * step / warmup
        return lr / math.sqrt(max(step, 1))
    if step < warmup:
        return lr * step / warmup
    if style == "constant":
        return lr
    if style == "exponential":
        return lr * EXPONENTIAL_DECAY ** (step - warmup)
    if step >= end:
        return 0.0
    progress = (step - warmup) / (end - warmup)
    if style == "linear":
        return lr * (1 - progress)
    return lr * (1 + math.cos(math.pi * progress)) / 2
