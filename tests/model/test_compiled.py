"""Compiled blocks give what the others give. The compiler's own code generation is left out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import rounding
import tiny
import torch
from torch._dynamo.utils import counters

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.model import compiled
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import quantize_
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"input": "春" * 8, "<ans>": "春" * 7},
    {"input": "春" * 40, "<ans>": "春" * 12},
]
BATCHES = [collate(tiny.encode(RECORDS[:n]), tiny.TOKENIZER) for n in (3, 2, 1, 3)]


def losses_and_gradients(model: CPMBee, batches: Sequence[Batch] = BATCHES) -> list[torch.Tensor]:
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), model.loss(batch)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def make_model(**changes: Any) -> CPMBee:
    """A model with LoRA."""
    model = tiny.make_model(1, **changes)
    delta.insert(model, delta.DeltaConfig(), 0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(4))
    return model


def test_layers_share_their_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kinds: the first, whose input needs no gradient, the last, and those between."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    frames = []
    for num_layers, checkpointing in ((3, False), (6, False), (6, True)):
        model = make_model(num_layers=num_layers)
        model.encoder.set_checkpointing(checkpointing)
        compiled.compile_blocks(model.encoder)
        model.loss(BATCHES[0]).backward()
        frames.append(counters["frames"]["total"])
    assert counters["frames"]["ok"] == frames[0] > 0
    assert frames == [frames[0]] * 3  # what later models need is there


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantized_base(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler cannot trace its products, and leaves them out."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model = make_model(num_layers=1, dim_model=64, num_heads=4, dim_head=16, dim_ff=128)
    quantize_(model, FORMATS[kind])
    plain = [copy.deepcopy(model) for _ in range(2)]
    rounding.nudge(dict(plain[1].named_parameters()), 1)
    trusted, nudged = (losses_and_gradients(m, BATCHES[:1]) for m in plain)
    compiled.compile_blocks(model.encoder)
    results = zip(losses_and_gradients(model, BATCHES[:1]), trusted, nudged, strict=True)
    for i, (actual, wanted, near) in enumerate(results):
        rounding.assert_as_exact(actual, [near], wanted, f"result {i}")
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_results(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    model = make_model()
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
