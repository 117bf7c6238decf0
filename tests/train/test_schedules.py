from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.train.schedules import STYLES, learning_rate

LR = 0.1


@pytest.mark.parametrize(
    ("style", "step", "rate"),
    [
        # warm-up 4, end 12
        ("noam", 0, 0.0),
        ("noam", 1, LR / 2 / 4),
        ("noam", 3, LR / 2 * 3 / 4),
        ("noam", 4, LR / 2),
        ("noam", 9, LR / 3),
        ("noam", 100, LR / 10),  # knows no end
        ("constant", 0, 0.0),
        ("constant", 2, LR / 2),
        ("constant", 4, LR),
        ("constant", 100, LR),
        ("linear", 1, LR / 4),
        ("linear", 4, LR),
        ("linear", 6, LR * 6 / 8),
        ("linear", 11, LR / 8),
        ("linear", 12, 0.0),
        ("linear", 13, 0.0),
        ("cosine", 3, LR * 3 / 4),
        ("cosine", 4, LR),
        ("cosine", 6, LR * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 8, LR / 2),
        ("cosine", 12, 0.0),
        ("cosine", 16, 0.0),  # does not rise again
        ("exponential", 2, LR / 2),
        ("exponential", 4, LR),
        ("exponential", 6, LR * 0.9025),
        ("exponential", 14, LR * 0.95**10),
    ],
)
def test_formulas(style: str, step: int, rate: float) -> None:
    assert learning_rate(style, LR, step, 4, 12) == pytest.approx(rate, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("style", STYLES)
def test_no_warm_up_starts_at_the_full_rate(style: str) -> None:
    assert learning_rate(style, LR, 0, 0, 10) == LR


@pytest.mark.parametrize("end", [1, 4])
@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_an_end_within_the_warm_up(style: str, end: int) -> None:
    rates = [learning_rate(style, LR, s, 4, end) for s in range(7)]
    assert rates == pytest.approx([0, LR / 4, LR / 2, LR * 3 / 4, 0, 0, 0])


@given(
    style=st.sampled_from(STYLES),
    step=st.integers(0, 10**7),
    warmup=st.integers(0, 10**6),
    end=st.integers(1, 10**7),
)
def test_never_negative_nor_above_the_start_rate(
    style: str, step: int, warmup: int, end: int
) -> None:
    assert 0 <= learning_rate(style, LR, step, warmup, end) <= LR * (1 + 1e-12)


@given(style=st.sampled_from(STYLES), warmup=st.integers(1, 10**6))
def test_the_warm_up_begins_at_zero_and_joins_the_decay(style: str, warmup: int) -> None:
    assert learning_rate(style, LR, 0, warmup, 10**7) == 0
    peak = LR / math.sqrt(warmup) if style == "noam" else LR
    before = learning_rate(style, LR, warmup - 1, warmup, 10**7)
    assert before == pytest.approx(peak * (warmup - 1) / warmup)
    assert learning_rate(style, LR, warmup, warmup, 10**7) == pytest.approx(peak)
