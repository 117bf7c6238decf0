"""The torch engine in one process; several processes are in tests/train/test_distributed.py."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
import torch
from torch import nn

from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee

SETTINGS = OptimizerSettings(
    weight_decay=0.1, clip_grad=1.0, loss_scale=8.0, loss_scale_factor=2.0, loss_scale_steps=3
)


class Toy(nn.Module):
    """Two trained tensors and a frozen one, which an engine must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.second = nn.Parameter(torch.randn(5, generator=generator))
        self.frozen = nn.Parameter(torch.randn(2, generator=generator), requires_grad=False)

    def loss(self, factor: float = 1.0) -> torch.Tensor:
        return factor * (self.first.pow(2).sum() + self.second.sin().sum() * self.frozen.sum())


def engine_of(
    toy: Toy, dtype: torch.dtype = torch.float32, settings: OptimizerSettings = SETTINGS
) -> TorchEngine:
    engine = TorchEngine(torch.device("cpu"), dtype)
    engine.prepare(cast(CPMBee, toy), settings)
    return engine


def test_steps_are_those_of_adamw_after_clipping() -> None:
    ours, theirs = Toy(), Toy()
    engine = engine_of(ours)
    optimizer = torch.optim.AdamW(
        [theirs.first, theirs.second], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    for step in range(6):
        factor, rate = 0.05 * (step + 1), 0.01 / (step + 1)  # the later steps are clipped
        engine.backward(ours.loss(factor))
        result = engine.step(rate)
        optimizer.zero_grad()
        theirs.loss(factor).backward()
        norm = nn.utils.clip_grad_norm_([theirs.first, theirs.second], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert not result.skipped
        assert torch.allclose(ours.first, theirs.first, rtol=0, atol=1e-7)
        assert torch.allclose(ours.second, theirs.second, rtol=0, atol=1e-7)
    assert torch.equal(ours.frozen, Toy().frozen)


def test_decay_is_decoupled_from_the_gradient() -> None:
    toy = Toy()
    before = toy.first.detach().clone()
    engine = engine_of(toy)
    engine.backward(toy.second.sum())  # no gradient for the other tensor
    engine.step(0.5)
    assert torch.allclose(toy.first, before * (1 - 0.5 * 0.1))


def test_gradients_of_several_backward_passes_add_up_and_end_with_the_step() -> None:
    one, two = Toy(), Toy()
    first, second = engine_of(one), engine_of(two)
    for _ in range(2):
        first.backward(one.loss(0.06))
        second.backward(two.loss(0.02))
        second.backward(two.loss(0.04))
        norms = [first.step(0.1).grad_norm, second.step(0.1).grad_norm]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert torch.allclose(one.first, two.first)


def test_a_rank_without_records_steps_with_zero_gradients() -> None:
    toy = Toy()
    engine = engine_of(toy)
    engine.backward(toy.loss())
    engine.step(0.1)
    result = engine.step(0.1)  # no backward pass: the gradients of the last step must not count
    assert result.grad_norm == 0 and not result.skipped


def test_the_loss_scale_changes_no_update() -> None:
    plain, scaled = Toy(), Toy()
    engines = engine_of(plain), engine_of(scaled, torch.float16)
    norms = []
    for engine, toy in zip(engines, (plain, scaled), strict=True):
        engine.backward(toy.loss(0.3))
        norms.append(engine.step(0.01).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert torch.allclose(plain.first, scaled.first, rtol=0, atol=1e-7)
    assert (engines[0].loss_scale, engines[1].loss_scale) == (1.0, 8.0)


def test_an_overflow_halves_the_scale_and_skips_the_step() -> None:
    toy = Toy()
    engine = engine_of(toy, torch.float16)
    before = toy.first.detach().clone()
    engine.backward(toy.loss(math.inf))
    result = engine.step(0.1)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert engine.loss_scale == 4.0
    assert torch.equal(toy.first, before)
    engine.backward(toy.loss())
    assert not engine.step(0.1).skipped
    assert not torch.equal(toy.first, before)


def test_the_scale_grows_after_good_steps_in_a_row() -> None:
    toy = Toy()
    engine = engine_of(toy, torch.float16)
    scales = []
    for step in range(9):
        engine.backward(toy.loss(math.nan if step == 2 else 1.0))
        engine.step(1e-4)
        scales.append(engine.loss_scale)
    #                 overflow in the third step: its count of good steps begins again
    assert scales == [8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_a_vanishing_scale_ends_the_run() -> None:
    toy = Toy()
    engine = engine_of(toy, torch.float16)
    with pytest.raises(RunError, match="overflow at every loss scale"):
        for _ in range(200):
            engine.backward(toy.loss(math.inf))
            engine.step(0.1)
    assert all(torch.isfinite(p).all() for p in toy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_finite_end_a_run_without_scale(dtype: torch.dtype) -> None:
    toy = Toy()
    engine = engine_of(toy, dtype)
    engine.backward(toy.loss(math.nan))
    with pytest.raises(RunError, match="not finite"):
        engine.step(0.1)
    assert engine.loss_scale == 1
    assert torch.equal(toy.first, Toy().first)


def test_statistics_are_those_after_the_step() -> None:
    toy = Toy()
    engine = engine_of(toy)
    engine.backward(toy.loss())
    norm = engine.step(0.01).grad_norm
    assert norm > 1  # so that clipping shows
    statistics = {s.name: s for s in engine.statistics()}
    assert list(statistics) == ["first", "second"]
    first = statistics["first"]
    values = toy.first.detach().double()
    assert first.shape == (3, 4)
    assert first.mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert first.std == pytest.approx(values.var(correction=0).sqrt().item(), rel=1e-5)
    assert math.hypot(*(s.grad_norm for s in statistics.values())) == pytest.approx(1.0, rel=1e-4)


def test_training_goes_on_exactly_from_a_saved_state() -> None:
    def advance(engine: TorchEngine, toy: Toy, steps: int) -> None:
        for step in range(steps):
            engine.backward(toy.loss(0.1 * (step + 1)))
            engine.step(0.01)

    straight = Toy()
    engine = engine_of(straight, torch.float16)
    advance(engine, straight, 2)
    state = copy.deepcopy(engine.training_state())  # as a file would hold it
    saved_first = state["tensors"]["first"].clone()
    other = Toy()
    nn.init.zeros_(other.first)
    resumed = engine_of(other, torch.float16)
    resumed.load_training_state(state)
    assert torch.equal(other.first, saved_first)
    advance(engine, straight, 3)
    advance(resumed, other, 3)
    assert torch.equal(straight.first, other.first)
    assert torch.equal(straight.second, other.second)
    assert engine.loss_scale == resumed.loss_scale == 16


def test_flags_of_this_run_win_over_those_of_the_saved_one() -> None:
    first = engine_of(Toy(), torch.float16)
    toy = Toy()
    settings = OptimizerSettings(0.5, 1.0, 8.0, 2.0, 3)
    second = engine_of(toy, torch.float32, settings)
    second.load_training_state(first.training_state())
    assert second.loss_scale == 1  # a run in fp32 has none, whatever the saved one had
    before = toy.first.detach().clone()
    second.backward(toy.second.sum())
    second.step(0.1)
    assert torch.allclose(toy.first, before * (1 - 0.1 * 0.5))


def test_a_state_with_other_tensors_is_refused() -> None:
    engine = engine_of(Toy())
    state = engine.training_state()
    del state["tensors"]["second"]
    with pytest.raises(RunError, match="other trained tensors"):
        engine.load_training_state(state)


def test_one_process_reduces_to_its_own_values() -> None:
    engine = engine_of(Toy())
    assert engine.reduce([1.5, 2.0]) == [1.5, 2.0]
    assert (engine.rank, engine.world_size) == (0, 1)
