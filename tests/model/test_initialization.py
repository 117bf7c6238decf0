from __future__ import annotations

import pytest
import tiny
import torch

from cpm_bee.data.batch import collate
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee, target_loss

MASKS = ((False, True), (True, True), (True, False))


def make(seed: int, **changes: object) -> CPMBee:
    model = CPMBee(tiny.make_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # as memory may be that nobody filled
    model.load_state_dict(dict(initial_values(model, seed)))
    return model


def test_it_depends_on_the_seed_alone() -> None:
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        states.append(make(seed).state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    differing = {n for n in states[0] if not torch.equal(states[0][n], states[2][n])}
    assert differing == {n for n in states[0] if "layernorm" not in n}


@pytest.mark.parametrize(
    "changes", [{}, {"num_heads": 1}, {"num_heads": 3}, {"num_layers": 3, "mask_modules": MASKS}]
)
def test_any_model_starts_with_a_sound_loss(changes: dict) -> None:
    """Every weight is set, the loss is near that of a guess, and every weight gets a gradient."""
    model = make(0, **changes)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    batch = collate(tiny.encode([{"input": "春 é" * 5, "<ans>": "é 天风春"}]), tiny.TOKENIZER)
    loss = target_loss(model(batch), batch) / batch.num_targets
    assert 0 < loss.item() < 5 * torch.tensor(float(len(tiny.TOKENIZER))).log()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
