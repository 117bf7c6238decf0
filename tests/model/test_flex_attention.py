"""FlexAttention gives what SDPA over padded groups gives; on a CPU in its plain form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import rounding
import tiny
import torch
from torch import nn
from torch.nn.attention import flex_attention as torch_flex

from cpm_bee.data.batch import Batch, collate
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, RunError
from cpm_bee.model import flex_attention
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, align_bias
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"<ans>": {"<mask_0>": "ü", "<mask_1>": "漢"}, "input": "ab<mask_0><mask_1>"},
    {"input": tiny.chain("x", 12, "ü 漢" * 6), "<ans>": ""},
    {"input": "春" * 80, "<ans>": "春" * 70},
]


class Inputs(nn.Module):
    """What attention works on: the model's bias, and queries, keys and values."""

    def __init__(self, at_targets: bool, with_samples: bool = False) -> None:
        super().__init__()
        self.model, self.at_targets = tiny.make_model(1), at_targets
        encoded = tiny.encode(RECORDS)
        if with_samples:
            encoder = Encoder(tiny.TOKENIZER)
            encoded[2] = encoder.encode(RECORDS[2], samples=[RECORDS[1], RECORDS[3]])
            encoded[0] = encoder.encode(RECORDS[0], samples=[RECORDS[2]])
        self.batch = collate(encoded, tiny.TOKENIZER)
        assert self.batch.has_samples == with_samples
        assert self.batch.num_tokens > 2 * 128  # several blocks of the mask
        generator = torch.Generator().manual_seed(2)
        heads = (self.model.config.num_heads, self.model.config.dim_head)
        n = self.batch.num_targets if at_targets else self.batch.num_tokens
        sizes = (n, self.batch.num_tokens, self.batch.num_tokens)
        self.qkv = nn.ParameterList(torch.randn(s, *heads, generator=generator) for s in sizes)


Attend = Callable[[Inputs], torch.Tensor]
Compute = Callable[[Inputs], dict[str, torch.Tensor]]


def flexible(run: Compute) -> Compute:
    """FlexAttention works in the type of its inputs, and under no dispatch mode."""

    def as_written(inputs: Inputs) -> dict[str, torch.Tensor]:
        with rounding.as_written():
            return run(inputs)

    return as_written


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's plain form, which lays out all scores."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)


def by_flex(inputs: Inputs) -> torch.Tensor:
    batch, bias = inputs.batch, inputs.model.position_bias
    attend = flex_attention.FlexAttention(batch, bias, at_targets=inputs.at_targets)
    return attend(0, *inputs.qkv)


def padded(inputs: Inputs) -> torch.Tensor:
    bias = inputs.model.position_bias
    groups = PaddedGroups.of(inputs.batch, bias, at_targets=inputs.at_targets)
    return PaddedAttention(groups, bias, torch.float32, 0.0)(0, *inputs.qkv)


both = pytest.mark.parametrize("with_samples", [False, True], ids=["alone", "with samples"])


@both
@pytest.mark.parametrize("at_targets", [False, True])
def test_forward(at_targets: bool, with_samples: bool) -> None:
    def output(attend: Attend) -> Compute:
        @torch.no_grad()
        def run(inputs: Inputs) -> dict[str, torch.Tensor]:
            return {"output": attend(inputs.requires_grad_(False))}

        return run

    inputs = Inputs(at_targets, with_samples)
    rounding.assert_same(inputs, flexible(output(by_flex)), output(padded))


@both
@pytest.mark.parametrize("at_targets", [False, True])
def test_gradients(at_targets: bool, with_samples: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses a backward pass on the CPU, but its plain form has one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)

    def gradients(attend: Attend) -> Compute:
        def run(inputs: Inputs) -> dict[str, torch.Tensor]:
            o = attend(inputs)
            weights = torch.arange(o.numel(), dtype=o.dtype).view_as(o).sin()
            bias = inputs.model.position_bias.relative_attention_bias
            found = torch.autograd.grad((o * weights).sum(), [bias, *inputs.qkv])
            assert all(gradient.abs().max() > 0.1 for gradient in found)
            return dict(zip(("bias", "q", "k", "v"), found, strict=True))

        return run

    inputs = Inputs(at_targets, with_samples)
    rounding.assert_same(inputs, flexible(gradients(by_flex)), gradients(padded))


@torch.no_grad()
def loss_of(model: CPMBee, batch: Batch) -> torch.Tensor:
    return model.loss(batch)


def test_the_model_by_either(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(False)
    model, batch = inputs.model, inputs.batch
    losses = [loss_of(model, batch)]
    for seed in (1, 2):
        nudged = copy.deepcopy(model)
        rounding.nudge(dict(nudged.named_parameters()), seed)
        losses.append(loss_of(nudged, batch))
    with rounding.double_precision():
        exact = loss_of(copy.deepcopy(model).double(), batch)
    made = []

    class Counted(flex_attention.FlexAttention):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(flex_attention, "FlexAttention", Counted)
    assert model.attention == "sdpa"
    assert loss_of(model, batch) == losses[0]
    assert not made
    model.attention = "flex"
    rounding.assert_as_exact(loss_of(model, batch), losses, exact, "loss")
    assert len(made) == 2


def test_what_is_in_the_way() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="--attention flex: it has no backward pass on a cpu"):
        flex_attention.refuse_if_unavailable(cpu, 0.0)
    assert "dropout" in str(flex_attention.unavailable_reason(torch.device("cuda"), 0.1))


@pytest.mark.slow
def test_more_variants_than_the_limit_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, PyTorch would otherwise run it uncompiled, with all scores in memory."""
    monkeypatch.undo()  # the fixture above
    monkeypatch.setattr(flex_attention, "_BACKEND", "eager")
    monkeypatch.setattr(flex_attention, "_RECOMPILE_LIMIT", 1)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    flex_attention._compiled.cache_clear()
    try:
        inputs = Inputs(False)
        with torch.no_grad():
            assert by_flex(inputs).isfinite().all()
        with pytest.raises(RunError, match=r"more than 1 compiled .* --attention sdpa"):
            by_flex(inputs)
    finally:
        flex_attention._compiled.cache_clear()


@pytest.mark.parametrize("length", [1, 8, 13])
def test_a_mask_laid_out_for_the_kernel(length: int) -> None:
    values = torch.randn(2, 5, length, 3).permute(0, 3, 1, 2)  # as an embedding gives them
    result = align_bias(values)
    assert torch.equal(result, values)
    assert result.stride(-1) == 1 and all(s % 8 == 0 for s in result.stride()[:-1])
