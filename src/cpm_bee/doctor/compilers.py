"""Steps `flex` and `compile` of `doctor.py --gpu`: what PyTorch's compiler makes of the model."""

from __future__ import annotations

import importlib
import time

import torch

from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import judge
from cpm_bee.doctor.child import Context
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee

_BATCHES = 40
_MOST_ENTRIES = 64
_PROBE = "cpm_bee.model.flex_probe"


def flex(context: Context) -> None:
    """FlexAttention: the product's own probe, then many batches of different lengths."""
    config = workload.make_config(context.device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _probe(context, config, dtype)
    batches = [workload.batch_of(workload.records(2 + i % 7, seed=i)) for i in range(_BATCHES)]
    model = workload.make_model(config, lora=True)
    exact = workload.train_exactly(model, batches, lr=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        _forget_compiled()
        held = workload.hold(workload.make_model(config, lora=True), dtype)
        held.encoder.set_checkpointing(True)
        name = str(dtype).removeprefix("torch.")
        trusted = [workload.train(held, batches, context.device, dtype, lr=0.0)]
        begin = time.perf_counter()
        actual = workload.train(held, batches, context.device, dtype, attention="flex", lr=0.0)
        seconds = time.perf_counter() - begin
        if dtype != torch.float32:
            exact = workload.train_exactly(held, batches, lr=0.0)
        for part in ("losses", "gradients"):
            found, expected = getattr(actual, part), getattr(exact, part)
            others = [getattr(t, part) for t in trusted]
            context.add(judge(f"{name}, {part}", found, others, expected, dtype))
        _check_entries(context, f"{name}, {_BATCHES} batches", seconds)


def _probe(context: Context, config: ModelConfig, dtype: torch.dtype) -> None:
    what = f"probe, {str(dtype).removeprefix('torch.')}"
    try:
        probe = importlib.import_module(_PROBE).probe
    except ImportError:
        context.not_available(what, "this version has no probe of FlexAttention")
        return
    reason = probe(config, dtype=dtype, device=context.device)
    context.check(what, reason is None, reason or "forward and backward agree with SDPA")


def compiled(context: Context) -> None:
    """Compiled layers give the same losses, gradients and steps."""
    from cpm_bee.model import compiled as product

    if context.on_cpu:
        # Without code generation, which takes a C++ compiler and minutes.
        product.BACKEND = "aot_eager"
        context.needs_cuda("code generation")
    config = workload.make_config(context.device)
    batches = [workload.batch_of(workload.records(4 + i, seed=i)) for i in range(3)]

    def compile_copy(model: CPMBee) -> None:
        product.compile_blocks(model.encoder)

    for dtype in (torch.float32,) if context.on_cpu else (torch.float32, torch.bfloat16):
        _forget_compiled()
        model = workload.hold(workload.make_model(config, lora=True), dtype)
        exact = workload.train_exactly(model, batches)
        trusted = workload.train_trusted(model, batches, dtype)
        begin = time.perf_counter()
        actual = workload.train(model, batches, context.device, dtype, prepare=compile_copy)
        seconds = time.perf_counter() - begin
        name = str(dtype).removeprefix("torch.")
        for part in ("losses", "gradients", "updates"):
            found, expected = getattr(actual, part), getattr(exact, part)
            others = [getattr(t, part) for t in trusted]
            context.add(judge(f"{name}, {part}", found, others, expected, dtype))
        _check_entries(context, f"{name}, {len(batches)} batches", seconds)


def _forget_compiled() -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # Otherwise a function with too many entries would run uncompiled, with a warning only.
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _check_entries(context: Context, what: str, seconds: float) -> None:
    from torch._dynamo.utils import counters

    entries = counters["stats"]["unique_graphs"]
    text = f"{entries} entries of Dynamo, at most {_MOST_ENTRIES} allowed; {seconds:.0f} s in all"
    context.check(what, 0 < entries <= _MOST_ENTRIES, text)
