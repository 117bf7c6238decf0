"""The measured bounds let rounding pass and nothing else."""

from __future__ import annotations

import math

import pytest
import rounding
import torch
from torch import nn


def linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(300, 40)


def output(layer: nn.Linear, factor: float = 1.0) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, 600).view(2, 300)
    return {"output": layer(x) * factor}


def by_columns(layer: nn.Linear) -> dict[str, torch.Tensor]:
    """The same, added one by one."""
    x = torch.linspace(-1, 1, 600).view(2, 300)
    y = torch.zeros(2, 40)
    for i in range(300):
        y = y + x[:, i, None] * layer.weight[:, i]
    return {"output": y + layer.bias}


def test_another_order_passes() -> None:
    rounding.assert_same(linear(), by_columns, output)
    assert not torch.equal(by_columns(linear())["output"], output(linear())["output"])


def test_a_small_mistake_of_the_formula_does_not() -> None:
    with pytest.raises(AssertionError, match="in double precision"):
        rounding.assert_same(linear(), lambda layer: output(layer, 1 + 1e-9), output)


def test_a_mistake_in_fp32_alone_does_not() -> None:
    def rough(layer: nn.Linear) -> dict[str, torch.Tensor]:
        is_double = layer.weight.dtype == torch.float64
        return output(layer, 1.0 if is_double else 1 + 1e-4)

    with pytest.raises(AssertionError, match="in fp32"):
        rounding.assert_same(linear(), rough, output)


def test_double_precision_reaches_what_asks_for_fp32_and_the_backward_pass() -> None:
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.float() * 2

        @staticmethod
        def backward(ctx: object, *g: torch.Tensor) -> torch.Tensor:
            seen.append(torch.zeros(3, dtype=torch.float32).dtype)
            return g[0].to(torch.float32) * 2

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with rounding.double_precision():
        y = Twice.apply(x)
        y.sum().backward()
    assert y.dtype == torch.float64 and x.grad is not None and x.grad.dtype == torch.float64
    assert seen == [torch.float64]
    assert torch.zeros(1).dtype == torch.float32


def test_both_precisions_draw_the_same_numbers() -> None:
    def draw() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        made = [torch.randn(9, generator=generator), torch.empty(9).uniform_(), torch.rand(3)]
        return [*made, nn.functional.dropout(torch.ones(99), 0.5)]

    single = draw()
    with rounding.double_precision():
        double = draw()
    assert all(torch.equal(a.double(), b) for a, b in zip(single, double, strict=True))


def test_nudged_values_differ_in_the_last_bit() -> None:
    values = torch.linspace(0.5, 1000, 999)
    nudged = values.clone()
    rounding.nudge({"values": nudged}, 1)
    change = (nudged - values).abs() / values
    assert 0 < change.max() <= rounding.EPS
    assert 0.2 < (change > 0).double().mean() < 0.8
    assert math.isclose(rounding.relative_error([1.0, 2.2], [1.0, 2.0]), 0.1 / math.sqrt(2))
