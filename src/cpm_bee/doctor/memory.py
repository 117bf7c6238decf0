"""Step `memory` of `doctor.py --gpu`: the memory of a training step, predicted and measured.

On a GPU it is one layer of the 10B, with its whole vocabulary and a record of 2,048 tokens. On a
CPU it is a small model, and the peak is that of the process, which the kernel counts.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import replace
from pathlib import Path

import torch

from cpm_bee import delta
from cpm_bee.data.batch import Batch
from cpm_bee.doctor.child import Context
from cpm_bee.doctor.quantization import has_bitsandbytes
from cpm_bee.doctor.workload import SETTINGS
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import buffers
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.train.memory_estimate import (
    TrainingSetup,
    estimate,
    meta_model,
    set_parameters,
    typical_batch,
)

MIB = 2**20
TOLERANCE = 0.1  # of benchmarks/gpu_memory.py: what kernels and allocators add
_VOCABULARY = 86_583
_LAYER = {"dim_model": 4096, "num_heads": 32, "dim_head": 128, "dim_ff": 10240, "num_layers": 1}
_SMALL = {"dim_model": 256, "num_heads": 4, "dim_head": 64, "dim_ff": 640, "num_layers": 4}
_TINY = {"dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 64, "num_layers": 2}


def layer(context: Context) -> None:
    if context.on_cpu:
        _on_cpu(context)
        return
    config = ModelConfig(vocab_size=_VOCABULARY, **_LAYER)  # type: ignore[arg-type]
    batch = typical_batch([2048], 64, _VOCABULARY)
    lora = TrainingSetup(torch.bfloat16, delta.DeltaConfig())
    setups = {"LoRA": lora, "LoRA, checkpointing": replace(lora, checkpointing=True)}
    setups |= {f"LoRA, {q}": replace(lora, quantize=q) for q in FORMATS}
    for name, training in setups.items():
        predicted = estimate(config, training, batch).peak
        measured, seconds = _gpu_peak(config, training, batch, context.device)
        slack = _decoded(config, training)
        note = f"{batch.num_tokens / seconds:,.0f} tokens/s"
        compare(context, name, predicted, measured, slack, note)


def compare(
    context: Context, name: str, predicted: int, measured: int, slack: int = 0, note: str = ""
) -> None:
    """Add a line: measured within 10 % of predicted, and above it by `slack` bytes more."""
    least, most = predicted * (1 - TOLERANCE), predicted * (1 + TOLERANCE) + slack
    text = f"predicted {predicted / MIB:,.0f} MiB, measured {measured / MIB:,.0f} MiB, allowed "
    text += f"{least / MIB:,.0f} to {most / MIB:,.0f}" + (f"; {note}" if note else "")
    context.check(name, least <= measured <= most, text)


def _decoded(config: ModelConfig, training: TrainingSetup) -> int:
    """The bytes of one weight while it is dequantized, which the prediction leaves out."""
    values = config.dim_model * config.dim_ff
    if training.quantize == "int8":
        return 4 * values  # in fp32
    if training.quantize == "nf4" and not has_bitsandbytes():
        return 8 * values  # and the indices of the pairs
    return 0


def _gpu_peak(
    config: ModelConfig, training: TrainingSetup, batch: Batch, device: torch.device
) -> tuple[int, float]:
    """Returns the peak of some steps in bytes, and the seconds of the last one."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.normal_(std=0.02) if dtype.is_floating_point else empty.random_(0, 128)

    model = meta_model(config, training)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.format = FORMATS[training.quantize]  # with its kernels
    set_parameters(model, training, make)
    model.attention = "sdpa"
    engine = TorchEngine(device, training.dtype)
    engine.prepare(model, SETTINGS)
    moved = batch.to(device)
    begin = 0.0
    for _ in range(4):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        with engine.autocast():
            loss = model.loss(moved)
        engine.backward(loss / batch.num_targets)
        engine.step(1e-3)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    return torch.cuda.max_memory_allocated(device) - before, seconds


def _on_cpu(context: Context) -> None:
    context.needs_cuda("a layer of the 10B")
    buffers._use_count = None  # turns off the buffer pool, which is not part of the prediction
    batch = typical_batch([89] * 8, 3, _VOCABULARY)
    for name, training in {
        "LoRA": TrainingSetup(torch.float32, delta.DeltaConfig()),
        "in full": TrainingSetup(torch.float32),
    }.items():
        config = ModelConfig(vocab_size=_VOCABULARY, **_SMALL)  # type: ignore[arg-type]
        predicted = estimate(config, training, batch).peak
        tiny = ModelConfig(vocab_size=_VOCABULARY, **_TINY)  # type: ignore[arg-type]
        _cpu_steps(tiny, training, batch)
        floor = _forget_peak()
        _cpu_steps(config, training, batch)
        compare(context, name, predicted, _peak() - floor)


def _cpu_steps(config: ModelConfig, training: TrainingSetup, batch: Batch) -> None:
    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).normal_(std=0.02)

    model = meta_model(config, training)
    set_parameters(model, training, make)
    engine = TorchEngine(torch.device("cpu"), training.dtype)
    engine.prepare(model, SETTINGS)
    for _ in range(2):
        engine.backward(model.loss(batch) / batch.num_targets)
        engine.step(1e-3)


def _forget_peak() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The largest resident size since `_forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
