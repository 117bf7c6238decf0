"""What a run says before its first step."""

from __future__ import annotations

from typing import Any

import pytest

from cpm_bee.train.data_size import DataSize
from cpm_bee.train.options import Options
from cpm_bee.train.schedules import STYLES, learning_rate
from cpm_bee.train.summary import data_lines, schedule_warnings


def warnings(min_steps: int, **values: Any) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return schedule_warnings(Options.parse(["--dataset", "x", *flags]), min_steps)


@pytest.mark.parametrize("style", STYLES)
def test_a_run_within_the_warm_up_is_named(style: str) -> None:
    [warning] = warnings(1, lr_decay_style=style)  # one step in all, 100 of warm-up
    assert "the whole run of about 1 step(s) is within the warm-up" in warning
    assert "--epoch" in warning and "--batch-size" in warning and "--warmup-iters" in warning
    [warning] = warnings(20, lr_decay_style=style, epoch=5)
    assert "about 100 step(s)" in warning
    assert warnings(20, lr_decay_style=style, epoch=5, max_steps=30)
    assert not warnings(21, lr_decay_style=style, epoch=5, warmup_iters=1)


def test_a_run_at_rate_0_is_named() -> None:
    [warning] = warnings(10, lr_decay_style="linear", start_step=50, train_iters=50, warmup_iters=5)
    assert "the learning rate is 0 in all of the about 10 step(s)" in warning


@pytest.mark.parametrize("style", STYLES)
def test_a_warning_is_true(style: str) -> None:
    """Whatever the flags: a run without a warning has a rate above a thousandth to its end."""
    for steps in (1, 2, 30, 400):
        for warmup in (0, 1, 10):
            for end in (3, 50, 1000):
                told = warnings(steps, lr_decay_style=style, warmup_iters=warmup, train_iters=end)
                rates = [learning_rate(style, 1.0, step, warmup, end) for step in range(steps)]
                if max(rates) == 0 or steps <= warmup:
                    assert told
                if not told:
                    assert rates[-1] > 0
                    assert style == "noam" or max(rates) > 0.5


def test_records_that_do_not_count_are_counted() -> None:
    size = DataSize(90, 5, 10, num_unanswered=3, num_unwritable=7)
    lines = data_lines("training", size, 512)
    assert lines[0] == "training: 90 records"
    text = "\n".join(lines)
    assert 'warning: 3 training records have no answer ("<ans>" is empty)' in text
    assert "warning: 5 training records (5.26%) are longer than" in text
    assert "warning: 7 training records have an answer that can never be generated" in text
    assert data_lines("training", DataSize(90, 0, 10), 512) == ["training: 90 records"]
    size = DataSize(90, 0, 10, in_context=(12, 5), num_shortened=4)
    assert data_lines("training", size, 512, about="about ") == [
        "training: about 90 records",
        "in-context samples of the first epoch: about 12 with 1, 5 with 2",
        "about 4 records have fewer than were drawn, as more do not fit into --max-length 512",
    ]
