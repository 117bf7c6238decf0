"""A Linear over quantized weights, alone and in a model: results, gradients, what is kept."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import rounding
import support
import tiny
import torch
import train_support

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.errors import InputError
from cpm_bee.generate.generator import Generator
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


@pytest.fixture
def dense_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision too, the weights are those that the codes stand for in fp32."""
    original = QuantizedLinear.dense

    def dense(
        layer: QuantizedLinear, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        if torch.get_default_dtype() != torch.float64:
            return original(layer, operands, dtype)
        with rounding.as_written():
            codes, absmax = operands
            return original(layer, (codes, absmax.float()), torch.float32).double()

    monkeypatch.setattr(QuantizedLinear, "dense", dense)


@formats
@pytest.mark.usefixtures("dense_as_stored")
@pytest.mark.parametrize("piece", [1 << 21, 128 * 7])
def test_product_and_gradient(format: Format, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_CHUNK", piece)  # the smaller one: a row count that is cut
    inputs = torch.randn(2, 3, 5, 128, generator=torch.Generator().manual_seed(1))

    def run(layer: Linear) -> dict[str, torch.Tensor]:
        x, g = (v.to(layer.operands()[-1].dtype) for v in inputs)
        y = layer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y, x, g[..., :96])
        return {"product": y, "gradient": gradient}

    layer = QuantizedLinear.of(make_linear(), format)
    rounding.assert_same(layer, run, lambda layer: run(dense_twin(layer)))


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


def make_model(format: Format) -> CPMBee:
    """A quantized model with LoRA."""
    model = tiny.make_model(2, **SIZES)
    quantize_(model, format)
    delta.insert(model, delta.DeltaConfig(rank=3, targets=delta.TARGETS), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 9)
    return model


def dense_model(model: CPMBee) -> CPMBee:
    """The model whose weights are what the codes stand for, with the same LoRA."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = dense_twin(module)
            dense.lora = module.lora
            twin.set_submodule(name, dense)
    return twin


@formats
@pytest.mark.usefixtures("dense_as_stored")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_is_that_of_the_dense_weights(format: Format, checkpointing: bool) -> None:
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)

    def run(model: CPMBee) -> dict[str, torch.Tensor]:
        model.train()
        model.encoder.set_checkpointing(checkpointing)
        loss = model.loss(batch)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(found) == 2 * 7 * 2  # A and B, layers, blocks
        return {"loss": loss, **found}

    rounding.assert_same(make_model(format), run, lambda model: run(dense_model(model)))


@formats
def test_generation(format: Format) -> None:
    record = {"input": "ab春天", "<ans>": ""}
    options = GenerationOptions(beam_size=2, max_length=5)
    model = make_model(format)
    models = model, dense_model(model)
    answers = [Generator(m, tiny.TOKENIZER).generate(record, options) for m in models]
    assert answers[0] == answers[1]


def test_parameters_are_counted_as_if_none_were_quantized() -> None:
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
