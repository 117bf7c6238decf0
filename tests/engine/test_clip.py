"""Clipping by the global norm."""

from __future__ import annotations

import math

import pytest
import torch

from cpm_bee.engine import torch_engine
from cpm_bee.engine.clip import clip_by_global_norm
from cpm_bee.train import memory_estimate


def make_gradients(scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2, 2))]


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_it_is_that_of_pytorch(scale: float) -> None:
    ours, theirs = make_gradients(scale), [torch.nn.Parameter(g) for g in make_gradients(scale)]
    for parameter, gradient in zip(theirs, make_gradients(scale), strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    assert clip_by_global_norm(ours, 2.0) == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(ours, theirs, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad)
    if scale < 0.1:
        assert all(torch.equal(*pair) for pair in zip(ours, make_gradients(scale), strict=True))


def test_the_norm_is_that_of_all_parts() -> None:
    """With two processes that have the same gradients, the sum of squares doubles."""
    parts = make_gradients(1.0)
    own = math.sqrt(sum(g.square().sum().item() for g in parts))
    norm = clip_by_global_norm(parts, 1.0, lambda square: 2 * square)
    assert norm == pytest.approx(math.sqrt(2) * own, rel=1e-6)
    after = math.sqrt(sum(g.square().sum().item() for g in parts))
    assert after == pytest.approx(1 / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_shows_in_the_norm(value: float) -> None:
    gradients = make_gradients(1.0)
    gradients[1][2] = value
    assert not math.isfinite(clip_by_global_norm(gradients, 1.0))


def test_engine_and_memory_estimate_use_it() -> None:
    for module in (torch_engine, memory_estimate):
        assert vars(module)["clip_by_global_norm"] is clip_by_global_norm
