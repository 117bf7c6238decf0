"""The bounds of the steps let rounding pass, and nothing else."""

from __future__ import annotations

import pytest
import torch

from cpm_bee.doctor.bounds import double_precision, judge, judge_equal, nudge
from cpm_bee.doctor.report import FAULT, OK

X = {"a": torch.randn(100, generator=torch.Generator().manual_seed(0)).double()}


def moved(by: float) -> dict[str, torch.Tensor]:
    return {"a": X["a"] * (1 + by)}


@pytest.mark.parametrize(
    ("dtype", "trusted", "passes", "fails"),
    [
        (torch.float32, 1e-6, 7e-6, 9e-6),  # eight times what is measured
        (torch.float32, 0.0, 1.8e-6, 2e-6),  # 16 roundings
        (torch.bfloat16, 0.0, 7.7e-3, 7.9e-3),  # one rounding
        (torch.float16, 1e-3, 7.9e-3, 8.1e-3),
    ],
)
def test_judge(dtype: torch.dtype, trusted: float, passes: float, fails: float) -> None:
    for error, verdict in ((passes, OK), (-passes, OK), (fails, FAULT), (-fails, FAULT)):
        line = judge("x", moved(error), [X, moved(trusted)], X, dtype)
        assert line.verdict == verdict, line
        assert "allowed" in line.text and str(dtype).removeprefix("torch.") in line.text


def test_what_is_no_result_is_a_fault() -> None:
    broken = {"a": X["a"].clone()}
    broken["a"][3] = float("nan")
    line = judge("x", broken, [X], X, torch.float32)
    assert (line.verdict, line.text) == (FAULT, "not finite: a")
    assert judge("x", {}, [X], X, torch.float32).verdict == FAULT
    # What is trusted must not be worthless itself, or it would allow anything.
    assert judge("x", X, [moved(1.0)], X, torch.bfloat16).verdict == FAULT
    assert judge("x", X, [broken], X, torch.float32).verdict == FAULT


def test_a_small_tensor_counts_by_its_own_size() -> None:
    both = {"large": torch.ones(10).double(), "small": torch.full((10,), 0.01).double()}
    wrong = {**both, "small": both["small"] * 1.01}
    assert judge("x", wrong, [both], both, torch.float32).verdict == FAULT


def test_equal_means_the_same_bits() -> None:
    zero = {"a": torch.zeros(3)}
    assert judge_equal("x", {"a": torch.zeros(3)}, zero).verdict == OK
    for other in (-torch.zeros(3), torch.zeros(3).double(), torch.zeros(1, 3)):
        assert judge_equal("x", {"a": other}, zero).verdict == FAULT
    assert judge_equal("x", {}, zero).verdict == FAULT


def test_nudge_moves_last_bits() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    nudged = {"a": values.clone()}
    nudge(nudged, 1)
    change = ((nudged["a"] - values) / values).abs()
    assert 0 < change.max() <= 2 * torch.finfo(torch.float32).eps
    assert 0.5 < (change > 0).float().mean() < 0.8


def test_double_precision() -> None:
    with double_precision():
        x = torch.ones(3, dtype=torch.float64).float()
        assert x.dtype == torch.zeros(2, dtype=torch.float32).dtype == torch.float64
