"""Step `quantize` of `doctor.py --gpu`: bases in 4 and 8 bit on the device."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import torch

from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import judge, judge_equal, nudge
from cpm_bee.doctor.child import Context
from cpm_bee.model.layers import Linear
from cpm_bee.quantize import kernels
from cpm_bee.quantize.formats import FORMATS, Format
from cpm_bee.quantize.linear import QuantizedLinear, quantize_

# What is installed is tried, whatever the product thinks of it.
_BITSANDBYTES = "bitsandbytes"
_ROWS = (4, 100)  # few rows have a kernel of their own


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec(_BITSANDBYTES) is not None


def quantize(context: Context) -> None:
    sizes = (128, 192) if context.on_cpu else (4096, 4096)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes, generator=generator)
    for fmt in FORMATS.values():
        _dense(context, fmt, weight)
        _products(context, fmt, weight)
        _losses(context, fmt)
    if context.on_cpu:
        context.needs_cuda("bitsandbytes' kernels")
    elif not has_bitsandbytes():
        context.not_available("bitsandbytes' kernels", "pip install bitsandbytes")


def _dense(context: Context, fmt: Format, weight: torch.Tensor) -> None:
    """Dequantized values: our own code gives the same bits on both devices."""
    codes, absmax = fmt.quantize(weight)
    moved = codes.to(context.device), absmax.to(context.device)
    for dtype in (torch.float32, torch.bfloat16):
        # The method of the base class: NF4 may use bitsandbytes on a GPU.
        expected = Format.dense(fmt, codes, absmax, dtype)
        actual = Format.dense(fmt, *moved, dtype)
        name = f"{fmt.name} to {str(dtype).removeprefix('torch.')}"
        context.add(judge_equal(name, {"weight": actual}, {"weight": expected}))
        if context.device.type == "cuda" and fmt.name == "nf4" and has_bitsandbytes():
            actual = kernels.dequantize(*moved, dtype)
            exact = {"weight": Format.dense(fmt, codes, absmax, torch.float32)}
            trusted = [{"weight": expected}]
            context.add(judge(f"{name}, bitsandbytes", {"weight": actual}, trusted, exact, dtype))


def _products(context: Context, fmt: Format, weight: torch.Tensor) -> None:
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = QuantizedLinear.of(linear, fmt)
    own = fmt.dense(layer.codes, layer.absmax, torch.float32)
    on_device = copy.deepcopy(layer).to(context.device)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in _ROWS:
            x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(1))
            x = x.to(dtype)
            exact = {"product": x.double() @ own.double().mT}
            trusted = []
            for seed in range(3):
                nudged = x.clone()
                if seed:
                    nudge({"x": nudged}, seed)
                trusted.append({"product": nudged @ own.to(dtype).mT})
            with torch.no_grad():
                actual = {"product": on_device.base(x.to(context.device))}
            what = f"{fmt.name}, product of {rows} rows, {str(dtype).removeprefix('torch.')}"
            context.add(judge(what, actual, trusted, exact, dtype))


def _losses(context: Context, fmt: Format) -> None:
    """Training over a quantized base gives what its dequantized weights give."""
    config = workload.make_config(context.device)
    if context.on_cpu:  # NF4 needs multiples of 64
        config = replace(config, dim_model=64, dim_head=32)
    model, plain = (workload.make_model(config, lora=True) for _ in range(2))
    quantize_(model, fmt)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            dense = fmt.dense(layer.codes, layer.absmax, torch.float32)
            plain.get_parameter(f"{name}.weight").data.copy_(dense)
    batches = [workload.batch_of(workload.records(6))]
    exact = workload.train_exactly(plain, batches)
    trusted = workload.train_trusted(plain, batches, torch.float32)
    actual = workload.train(model, batches, context.device, torch.float32)
    for part in ("losses", "gradients"):
        found, expected = getattr(actual, part), getattr(exact, part)
        others = [getattr(t, part) for t in trusted]
        context.add(judge(f"{fmt.name}, {part}", found, others, expected, torch.float32))
