"""Blocks with a backward pass of their own against PyTorch's gradients of the plain ones."""

from __future__ import annotations

import copy
import statistics

import pytest
import rounding
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.encoding import Encoder
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.frozen import block as frozen_block
from cpm_bee.model.network import CPMBee, target_loss
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"<ans>": {"<mask_0>": "ü", "<mask_1>": "漢"}, "input": "ab<mask_0><mask_1>"},
    {"input": tiny.chain("x", 12, "ü 漢" * 6), "<ans>": ""},
    {"input": "春" * 40, "<ans>": "春" * 12},
]
MASKS = ((False, False), (True, False), (False, True), (True, True), (False, False), (True, False))


def model_with_delta(
    targets: tuple[str, ...], masks: tuple[tuple[bool, bool], ...] = (), seed: int = 3
) -> CPMBee:
    sizes = {"num_layers": len(masks), "mask_modules": masks} if masks else {}
    model = tiny.make_model(seed, **sizes)
    delta.insert(model, delta.DeltaConfig(rank=3, targets=targets), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plainly(model: CPMBee, batch: Batch) -> torch.Tensor:
    """The loss by PyTorch's own gradients alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_block, "is_frozen", lambda module: False)
        return target_loss(model(batch), batch)


def gradients(loss: torch.Tensor, model: CPMBee) -> dict[str, torch.Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def compare(model: CPMBee, batch: Batch) -> None:
    def ours(model: CPMBee) -> dict[str, torch.Tensor]:
        loss = model.loss(batch)
        return {"loss": loss, **gradients(loss, model)}

    def theirs(model: CPMBee) -> dict[str, torch.Tensor]:
        loss = plainly(model, batch)
        return {"loss": loss, **gradients(loss, model)}

    rounding.assert_same(model, ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masks", [(), MASKS], ids=["whole", "pruned"])
@pytest.mark.parametrize(
    "targets",
    [("project_q", "project_v"), ("project_k",), ("attention_out", "w_1"), ("w_0", "w_out")],
    ids="+".join,
)
def test_same_as_plain(
    targets: tuple[str, ...], masks: tuple[tuple[bool, bool], ...], checkpointing: bool
) -> None:
    model = model_with_delta(targets, masks)
    model.encoder.set_checkpointing(checkpointing)
    compare(model, collate(tiny.encode(RECORDS), tiny.TOKENIZER))


def test_in_context_samples() -> None:
    encoder = Encoder(tiny.TOKENIZER)
    encoded = [encoder.encode(record, samples=RECORDS[:i]) for i, record in enumerate(RECORDS)]
    compare(model_with_delta(delta.TARGETS), collate(encoded, tiny.TOKENIZER))


def test_all_targets_at_once() -> None:
    compare(model_with_delta(delta.TARGETS), collate(tiny.encode(RECORDS), tiny.TOKENIZER))


@pytest.mark.slow
@examples(20)
@given(st.lists(tiny.records(), min_size=1, max_size=4))
def test_any_records(records: list[Record]) -> None:
    batch = collate(tiny.encode(records), tiny.TOKENIZER)
    compare(model_with_delta(("project_q", "project_v")), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_plain(dtype: torch.dtype) -> None:
    """In the middle of several models: for a single one, either may come out nearer by luck."""
    found = [distances_in_half_precision(dtype, seed) for seed in range(11)]
    assert statistics.median(ours for _, ours in found) < 0.05, found
    assert statistics.median(ours / plain for plain, ours in found) < 1.3, found


def distances_in_half_precision(dtype: torch.dtype, seed: int) -> list[float]:
    """How far the gradients in 16 bits are from those in fp32, plainly and by our blocks."""
    exact = model_with_delta(("project_q", "project_v", "w_out"), seed=seed)
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    truth = gradients(exact.loss(batch), exact)
    model = copy.deepcopy(exact)
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            parameter.data = parameter.data.to(dtype)
    distances = []
    for loss_of in (plainly, CPMBee.loss):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, batch)
        found = gradients(loss, model)
        assert all(g.dtype == torch.float32 for g in found.values())
        error = sum((found[n] - truth[n]).pow(2).sum().item() for n in truth)
        distances.append((error / sum(g.pow(2).sum().item() for g in truth.values())) ** 0.5)
    return distances


def test_dropout_and_full_tuning_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = frozen_block.frozen_block

    def block(*args: object, **options: bool) -> torch.Tensor:
        calls.append(1)
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen_block, "frozen_block", block)
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    model = model_with_delta(("project_q",)).train()
    model.loss(batch)
    assert len(calls) == model.config.num_layers
    for layer in model.encoder.layers:
        assert isinstance(layer, TransformerBlock) and layer.self_att is not None
        layer.self_att.dropout.p = 0.1
    model.loss(batch)
    model.eval()
    with torch.no_grad():
        model.loss(batch)
    tiny.make_model(0).loss(batch)
    assert len(calls) == model.config.num_layers


def test_nothing_is_kept_after_backward() -> None:
    """The graphs of attention live in no cycle: they go with the loss."""
    import gc
    import weakref

    model = model_with_delta(("project_q", "project_v"))
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    alive: list[weakref.ref] = []
    original = frozen_block.AttentionHalf.forward

    def forward(
        self: frozen_block.AttentionHalf, *args: torch.Tensor, **options: bool
    ) -> torch.Tensor:
        alive.append(weakref.ref(self))
        return original(self, *args, **options)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frozen_block.AttentionHalf, "forward", forward)
            loss = model.loss(batch)
        assert alive and all(ref() is not None for ref in alive)
        loss.backward()
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()
