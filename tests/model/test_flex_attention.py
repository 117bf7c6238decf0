"""FlexAttention gives what SDPA over padded groups gives; on a CPU in its plain form."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.attention import flex_attention as torch_flex

from cpm_bee.data.batch import Batch, collate
from cpm_bee.errors import InputError
from cpm_bee.model import flex_attention
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias, align_bias
from cpm_bee.model.layers import AttentionFunction
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"<ans>": {"<mask_0>": "ü", "<mask_1>": "漢"}, "input": "ab<mask_0><mask_1>"},
    {"input": tiny.chain("x", 12, "ü 漢" * 6), "<ans>": ""},
    {"input": "春" * 80, "<ans>": "春" * 70},
]


def make(at_targets: bool) -> tuple[CPMBee, Batch, list[torch.Tensor]]:
    model = tiny.make_model(1)
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    assert batch.num_tokens > 2 * 128  # several blocks of the mask
    generator = torch.Generator().manual_seed(2)
    heads = (model.config.num_heads, model.config.dim_head)
    n = batch.num_targets if at_targets else batch.num_tokens
    sizes = (n, batch.num_tokens, batch.num_tokens)
    return model, batch, [torch.randn(s, *heads, generator=generator) for s in sizes]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's plain form, which lays out all scores."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)


def padded(batch: Batch, bias: PositionBias, at_targets: bool) -> PaddedAttention:
    groups = PaddedGroups.of(batch, bias, at_targets=at_targets)
    return PaddedAttention(groups, bias, torch.float32, 0.0)


@pytest.mark.parametrize("at_targets", [False, True])
def test_forward(at_targets: bool) -> None:
    model, batch, qkv = make(at_targets)
    bias = model.position_bias
    with torch.no_grad():
        actual = flex_attention.FlexAttention(batch, bias, at_targets=at_targets)(0, *qkv)
        expected = padded(batch, bias, at_targets)(0, *qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_targets", [False, True])
def test_gradients(at_targets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses a backward pass on the CPU, but its plain form has one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    model, batch, qkv = make(at_targets)
    bias = model.position_bias
    inputs = [bias.relative_attention_bias, *(x.requires_grad_() for x in qkv)]

    def gradients(attend: AttentionFunction) -> tuple[torch.Tensor, ...]:
        o = attend(0, *qkv)
        weights = torch.arange(o.numel(), dtype=torch.float32).view_as(o).sin()
        return torch.autograd.grad((o * weights).sum(), inputs)

    actual = gradients(flex_attention.FlexAttention(batch, bias, at_targets=at_targets))
    for mine, theirs in zip(actual, gradients(padded(batch, bias, at_targets)), strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_model_by_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = make(False)
    with torch.no_grad():
        expected = model.loss(batch)
    made = []

    class Counted(flex_attention.FlexAttention):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(flex_attention, "FlexAttention", Counted)
    monkeypatch.setattr(flex_attention, "unavailable_reason", lambda *_: None)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(batch), expected, rtol=1e-5, atol=1e-5)
    assert len(made) == 2
    model.attention = "sdpa"
    with torch.no_grad():
        assert model.loss(batch) == expected
    assert len(made) == 2


def test_what_is_in_the_way() -> None:
    cpu = torch.device("cpu")
    assert not flex_attention.is_chosen("auto", cpu, 0.0)
    with pytest.raises(InputError, match="no backward pass on a cpu"):
        flex_attention.is_chosen("flex", cpu, 0.0)
    assert "dropout" in str(flex_attention.unavailable_reason(torch.device("cuda"), 0.1))


@pytest.mark.parametrize("length", [1, 8, 13])
def test_a_mask_laid_out_for_the_kernel(length: int) -> None:
    values = torch.randn(2, 5, length, 3).permute(0, 3, 1, 2)  # as an embedding gives them
    result = align_bias(values)
    assert torch.equal(result, values)
    assert result.stride(-1) == 1 and all(s % 8 == 0 for s in result.stride()[:-1])
