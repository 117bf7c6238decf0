"""A Linear over quantised weights, alone and in a model: results, gradients, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support
import tiny
import torch
import train_support

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.errors import InputError
from cpm_bee.generate.beam_search import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize import linear as quantized
from cpm_bee.quantize.formats import FORMATS, NF4, Format
from cpm_bee.quantize.linear import QuantizedLinear, num_weights, quantize_

formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
RECORDS = [{"input": "春天 ab" * 3, "<ans>": "天"}, {"input": "x", "<ans>": {"a": "b", "x": ""}}]
SIZES = {"dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 128}


def make_linear(dim_in: int = 128, dim_out: int = 96) -> Linear:
    linear = Linear(dim_in, dim_out)
    generator = torch.Generator().manual_seed(0)
    linear.weight.data.copy_(torch.randn(dim_out, dim_in, generator=generator))
    return linear


def dense_twin(layer: QuantizedLinear) -> Linear:
    twin = Linear(layer.dim_in, layer.dim_out)
    twin.weight.data.copy_(layer.dense(layer.operands(), torch.float32))
    return twin.requires_grad_(False)


@formats
@pytest.mark.parametrize("piece", [1 << 21, 128 * 7])
def test_product_and_gradient(format: Format, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_CHUNK", piece)  # the smaller one: a row count that is cut
    layer = QuantizedLinear.of(make_linear(), format)
    twin = dense_twin(layer)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    (found,), (wanted,) = (torch.autograd.grad(v, x, g) for v in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@formats
def test_it_has_operands_and_no_weight(format: Format) -> None:
    linear = make_linear()
    layer = QuantizedLinear.of(linear, format)
    assert {n for n, _ in layer.named_parameters()} == {"codes", "absmax"}
    assert not any(p.requires_grad for p in layer.parameters())
    assert not hasattr(layer, "weight")
    assert (layer.dim_in, layer.dim_out, layer.scale) == (128, 96, linear.scale)
    error = (layer.dense(layer.operands(), torch.float32) - linear.weight).abs().mean()
    assert 0 < error < (0.09 if isinstance(format, NF4) else 0.01)


def test_only_the_operands_are_kept_for_the_backward_pass() -> None:
    layer = QuantizedLinear.of(make_linear(), FORMATS["nf4"])
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(50, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.base(x)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in layer.operands()]


@formats
def test_under_autocast(format: Format) -> None:
    layer = QuantizedLinear.of(make_linear(), format)
    twin = dense_twin(layer)
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), twin(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    (found,) = torch.autograd.grad(y.float().sum(), x)
    (wanted,) = torch.autograd.grad(expected.float().sum(), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=5e-2)


# ------------------------------------------------------------------ in a model


def make_models(format: Format) -> tuple[CPMBee, CPMBee]:
    """A quantised model, and one whose weights are what the codes stand for; with equal LoRA."""
    model, twin = tiny.make_model(2, **SIZES), tiny.make_model(2, **SIZES)
    quantize_(model, format)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            dense = module.dense(module.operands(), torch.float32)
            twin.get_submodule(name).weight.data.copy_(dense)
    for m in (model, twin):
        delta.insert(m, delta.DeltaConfig(rank=3, targets=delta.TARGETS), 0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in m.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 9)
    return model, twin


@formats
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_is_that_of_the_dense_weights(format: Format, checkpointing: bool) -> None:
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    results = []
    for model in make_models(format):
        model.train()
        model.encoder.set_checkpointing(checkpointing)
        loss = model.loss(batch)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, found), (expected, wanted) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    trained = [name for name, gradient in wanted.items() if gradient is not None]
    assert len(trained) == 2 * 7 * 2  # A and B, layers, blocks
    assert [name for name, gradient in found.items() if gradient is not None] == trained
    for name in trained:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


@formats
def test_generation(format: Format) -> None:
    record = {"input": "ab春天", "<ans>": ""}
    options = GenerationOptions(beam_size=2, max_length=5)
    answers = [Generator(m, tiny.TOKENIZER).generate(record, options) for m in make_models(format)]
    assert answers[0] == answers[1]


def test_parameters_are_counted_as_if_none_were_quantised() -> None:
    model = tiny.make_model(0, **SIZES)
    before = sum(p.numel() for p in model.parameters())
    quantize_(model, FORMATS["nf4"])
    assert num_weights(model) == before > sum(p.numel() for p in model.parameters())


def test_a_model_that_the_format_cannot_hold_is_left_alone() -> None:
    model = tiny.make_model(0)
    with pytest.raises(InputError) as caught:
        quantize_(model, FORMATS["nf4"])
    text = str(caught.value)
    assert "--quantize nf4" in text and "int8" in text
    assert text.count("w_out") == 1 and "14 columns" in text  # once, not for each layer
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    quantize_(model, FORMATS["int8"])


@pytest.mark.slow
def test_shards_of_two_processes_do_as_one_does(tmp_path: Path) -> None:
    script = support.ROOT / "tests" / "quantize" / "sharded.py"
    command = train_support.command(ranks=2, script=script)
    paths = [support.ROOT / "src", support.ROOT / "tests"]
    path = os.pathsep.join(map(str, paths))
    process = train_support.start(command, tmp_path, PYTHONPATH=path, TMPDIR=str(tmp_path))
    status, output, errors = train_support.finish(process)
    assert status == 0, errors
    assert output.strip() == "all equal"
