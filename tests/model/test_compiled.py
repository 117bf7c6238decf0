"""Compiled blocks give what the others give. The compiler's own code generation is left out."""

from __future__ import annotations

import copy

import pytest
import rounding
import tiny
import torch
from torch._dynamo.utils import counters

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.model import compiled
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"input": "春" * 8, "<ans>": "春" * 7},
    {"input": "春" * 40, "<ans>": "春" * 12},
]
BATCHES = [collate(tiny.encode(RECORDS[:n]), tiny.TOKENIZER) for n in (3, 2, 1, 3)]


def losses_and_gradients(model: CPMBee) -> list[torch.Tensor]:
    found = []
    for batch in BATCHES:
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), model.loss(batch)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_results(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    model = tiny.make_model(1)
    delta.insert(model, delta.DeltaConfig(), 0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(4))
    names = list(model.state_dict())
    plain = [copy.deepcopy(model) for _ in range(3)]
    for seed in (1, 2):
        rounding.nudge(dict(plain[seed].named_parameters()), seed)
    trusted = [losses_and_gradients(m) for m in plain]
    with rounding.double_precision():
        exact = losses_and_gradients(copy.deepcopy(model).double())
    model.encoder.set_checkpointing(checkpointing)
    compiled.compile_blocks(model.encoder)
    assert list(model.state_dict()) == names
    results = zip(losses_and_gradients(model), exact, *trusted, strict=True)
    for i, (actual, wanted, *others) in enumerate(results):
        rounding.assert_as_exact(actual, others, wanted, f"result {i}")
    # It was compiled, in pieces around the attention, and not again for every batch.
    assert counters["stats"]["unique_graphs"] > 0
    assert all("disable" in reason for reason in counters["graph_break"])
    before = counters["stats"]["unique_graphs"]
    losses_and_gradients(model)
    assert counters["stats"]["unique_graphs"] == before
