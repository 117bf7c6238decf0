"""What bmtrain 1.0.1 does, often in silence, and what keeps our engine clear of it.

Each test shows bmtrain's way on toys and, beside it, that the engine is not caught; a new version
of bmtrain that acts in another way fails here first.
"""

from __future__ import annotations

import inspect
from typing import Any

import bmtrain_cpu
import pytest
import tiny
import torch
from bmtrain_toys import WORLD, Layer, Stack, batch_of, inputs, true_gradients
from torch import nn

from cpm_bee import delta


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the scenes found, by rank."""
    bmtrain_cpu.require()
    folder = tmp_path_factory.mktemp("rules")
    bmtrain_cpu.run_ranks("bmtrain_toys.py", WORLD, folder)
    return [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(WORLD)]


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def true_norm() -> float:
    """The gradient norm of the two ranks' batches, by plain PyTorch."""
    model = tiny.make_model(3, num_layers=2).train()
    for rank in range(WORLD):
        model.loss(batch_of(rank)).backward()
    return float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))


@pytest.mark.slow
def test_a_tensor_unfrozen_after_wrapping_has_local_gradients(found: Found) -> None:
    local = Stack(frozen := Layer(), Layer())
    local(inputs(0)).backward()
    torch.testing.assert_close(found[0]["unfrozen_later"], frozen.weight.grad)
    true = true_gradients(Layer(), Layer())[0]
    assert not torch.allclose(found[0]["unfrozen_later"], true)


@pytest.mark.slow
def test_a_block_list_with_a_frozen_begin_mistrains(found: Found) -> None:
    # The engine's runs "delta-pruned" begin with a frozen layer.
    true = true_gradients(Layer(requires_grad=False), Layer(), Layer())[1:]
    first, second = (f["list_with_a_frozen_begin"] for f in found)
    torch.testing.assert_close(first["ModuleList"], true)
    assert second["ModuleList"] == [None, None]
    assert not torch.allclose(first["TransformerBlockList"][0], true[0])


def test_the_model_has_nothing_that_wrapping_breaks() -> None:
    model = tiny.make_model()
    delta.insert(model, delta.DeltaConfig(targets=delta.TARGETS), seed=0)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.parameters()))  # tied tensors are untied
    assert not list(model.buffers())
    for layer in model.encoder.layers:
        assert not [m for m in layer.modules() if isinstance(m, nn.ModuleList)]
        parameters = inspect.signature(layer.forward).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.slow
def test_fp32_weights_are_decayed_through_their_gradient(found: Found) -> None:
    # The engine's decay is compared with the torch engine's in test_bmtrain_engine.py.
    of_fp32, of_fp16 = (found[0]["decay"][t] for t in (torch.float32, torch.float16))
    torch.testing.assert_close(of_fp32, torch.full((6,), 4.0 - 0.1))  # a step of Adam
    torch.testing.assert_close(of_fp16, torch.full((6,), 4.0 * (1 - 0.1 * 0.5)), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_gradients_set_to_none_come_back(found: Found, true_norm: float) -> None:
    (to_none, to_zero), norms = found[0]["gradients_set_to_none"]
    (true,) = true_gradients(Layer())
    torch.testing.assert_close(to_zero, true)
    torch.testing.assert_close(to_none, 2 * true)
    assert norms == pytest.approx([true_norm, true_norm], rel=1e-5)


@pytest.mark.slow
def test_gradients_are_averaged_unless_told_otherwise(found: Found, true_norm: float) -> None:
    (averaged, summed), norm = found[0]["averaged_or_summed"]
    (true,) = true_gradients(Layer())
    torch.testing.assert_close(averaged, true / WORLD)
    torch.testing.assert_close(summed, true)
    assert norm == pytest.approx(true_norm, rel=1e-5)


@pytest.mark.slow
def test_overflow_is_seen_in_16_bit_and_with_a_loss_scale_only(found: Found) -> None:
    # The engine's runs "overflow-delta" overflow in fp32 gradients.
    (seen, scale), (missed, kept), (unscaled, _) = found[0]["overflow"].values()
    assert torch.equal(seen, torch.ones(6)) and scale == 4
    assert missed.isnan().all() and kept == 8
    assert unscaled.isnan().all()


@pytest.mark.slow
def test_parameters_are_flat_parts_and_may_be_empty(found: Found) -> None:
    (first, saved), (second, _) = (f["parts"] for f in found)
    assert all(len(shape) == 1 for shape in first.values())
    assert (0,) in first.values() and (0,) in second.values()
    for name, parameter in tiny.make_model(3, num_layers=2).named_parameters():
        assert sum(first[name] + second[name]) == parameter.numel()
        assert torch.equal(saved[name], parameter)


@pytest.mark.slow
def test_schedules_begin_at_zero_so_ours_is_used(found: Found) -> None:
    theirs, moved = found[0]["first_rate"]
    assert theirs == 0
    assert moved == pytest.approx(0.01, rel=1e-3)  # Adam's first step is the rate


@pytest.mark.slow
def test_a_view_as_gradient_is_sent_from_its_storages_begin(found: Found) -> None:
    wrong, right = found[0]["view_as_gradient"]
    true = WORLD * (torch.arange(6.0) + 4)
    assert not torch.allclose(wrong, true)
    torch.testing.assert_close(right, true)


@pytest.mark.slow
def test_its_checkpointing_has_no_gradient_around_the_arguments(found: Found) -> None:
    # The trained bias table comes so; the engine's runs "full" compare its gradient.
    recomputed, kept = found[0]["gradient_around_the_arguments"]
    assert isinstance(recomputed, str) and "second time" in recomputed
    h, leaf = inputs(0), torch.ones(6, requires_grad=True)
    for layer in (Layer(), Layer()):
        h = layer(h, leaf.exp)
    h.sum().backward()
    torch.testing.assert_close(kept, leaf.grad)


@pytest.mark.slow
def test_a_layer_is_computed_again_outside_of_autocast_unless_it_enters_it(found: Found) -> None:
    theirs, ours = found[0]["autocast_of_the_first_layer"]
    assert theirs == [True, False]
    assert ours == [True, True]


@pytest.mark.slow
def test_a_layer_is_whole_only_while_it_computes(found: Found) -> None:
    seen, dimensions = found[0]["whole_while_it_computes"]
    first, second, neither = [True, False], [False, True], [False, False]
    assert seen == [first, second, second, first, neither]
    assert set(dimensions) == {1}
