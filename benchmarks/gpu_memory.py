"""Predict the memory of a training step for the released sizes, without a GPU.

    python benchmarks/gpu_memory.py              # print the table
    python benchmarks/gpu_memory.py --check      # compare with measured peaks on the CPU
    python benchmarks/gpu_memory.py --gpu 10B    # compare with measured peaks on a GPU

`cpm_bee.train.memory_estimate` runs a real step on tensors without values. It does not include
memory inside kernels, fragmentation, or the CUDA context (about 0.5 GiB). The table has not been
compared with a GPU yet (docs/gpu-checklist.md).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from process_memory import peak_memory
from tqdm import tqdm

from cpm_bee import delta
from cpm_bee.data.batch import Batch
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import buffers
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import QuantizedLinear, quantize_
from cpm_bee.train.memory_estimate import (
    TrainingSetup,
    estimate,
    meta_model,
    set_parameters,
    typical_batch,
)
from cpm_bee.train.plan.released import released_sizes
from cpm_bee.train.sharded_estimate import estimate_sharded

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 2**30, 2**20
# Records of CCPM's mean length, and the worst case for attention.
BATCHES = {"23 records of 89": ([89] * 23, 3), "1 record of 2,048": ([2048], 64)}

CHECKED = {
    "256x4": {"dim_model": 256, "num_heads": 4, "dim_head": 64, "dim_ff": 640, "num_layers": 4},
    "512x8": {"dim_model": 512, "num_heads": 8, "dim_head": 64, "dim_ff": 1280, "num_layers": 8},
    "768x8": {"dim_model": 768, "num_heads": 12, "dim_head": 64, "dim_ff": 2048, "num_layers": 8},
}
FP32_LORA = TrainingSetup(torch.float32, delta.DeltaConfig())
WAYS = {
    "LoRA": FP32_LORA,
    "LoRA, checkpointing": replace(FP32_LORA, checkpointing=True),
    "LoRA, nf4": replace(FP32_LORA, quantize="nf4"),
    "in full": TrainingSetup(torch.float32),
    "in full, checkpointing": TrainingSetup(torch.float32, checkpointing=True),
}


def rows() -> Iterator[tuple[str, str, TrainingSetup]]:
    for size in released_sizes():
        for quantize in ("none", "nf4", "int8"):
            for checkpointing in (False, True):
                training = TrainingSetup(
                    torch.bfloat16, delta.DeltaConfig(), quantize, checkpointing
                )
                name = "LoRA, bf16" if quantize == "none" else f"LoRA, {quantize}"
                yield size, name + (", checkpointing" if checkpointing else ""), training


def print_table(batch: Batch) -> None:
    sizes = released_sizes()
    print("| model | training | base | LoRA's gradients, moments | rest | peak, GiB |")
    print("|---|---|---|---|---|---|")
    for size, name, training in tqdm(list(rows()), disable=None):
        p = estimate(sizes[size], training, batch)
        parts = (p.weights, p.gradients + p.moments, p.rest, p.peak)
        print(f"| {size} | {name} | " + " | ".join(f"{x / GIB:.2f}" for x in parts) + " |")
    for checkpointing in (False, True):
        print(sharded_row(sizes["1B"], batch, checkpointing, ranks=4))


def sharded_row(config: ModelConfig, batch: Batch, checkpointing: bool, ranks: int) -> str:
    """A row for full fine-tuning on several ranks (FSDP2, bf16)."""
    training = TrainingSetup(torch.bfloat16, checkpointing=checkpointing)
    p = estimate_sharded(config, training, batch, ranks)
    name = f"in full, {ranks} ranks" + (", checkpointing" if checkpointing else "")
    parts = (p.weights, p.gradients + p.moments, p.rest, p.peak)
    return f"| 1B | {name} | " + " | ".join(f"{x / GIB:.2f}" for x in parts) + " |"


def check(tolerance: float) -> bool:
    """Compare with the peaks of child processes; returns whether all are within `tolerance`."""
    print("| model | training | predicted, MiB | measured, MiB | predicted / measured |")
    print("|---|---|---|---|---|")
    good = True
    for size, sizes in tqdm(CHECKED.items(), disable=None):
        for name, training in WAYS.items():
            command = [sys.executable, __file__, "--measure", size, name]
            environment = measured_environment()
            measured = float(subprocess.check_output(command, text=True, env=environment))
            predicted = estimate(checked_config(sizes), training, checked_batch()).peak / MIB
            ratio = predicted / measured
            good = good and abs(ratio - 1) <= tolerance
            print(f"| {size} | {name} | {predicted:.0f} | {measured:.0f} | {ratio:.2f} |")
    return good


def measured_environment() -> dict[str, str]:
    """An environment in which freed memory returns to the system, so that peaks are live memory.

    By default, malloc keeps holes between blocks: 10 % more with a delta, 40 to 60 % more in full
    fine-tuning.
    """
    return {**os.environ, "MALLOC_TRIM_THRESHOLD_": "1000000"}


def checked_config(sizes: dict[str, Any]) -> ModelConfig:
    return ModelConfig(vocab_size=86_583, **sizes)


def checked_batch() -> Batch:
    return typical_batch(*BATCHES["23 records of 89"], vocab_size=86_583)


def measure(size: str, way: str) -> float:
    """The peak of some steps in MiB, above the memory of a process after steps of a tiny model."""
    buffers._use_count = None  # turns off the buffer pool, which is not part of the prediction
    tiny = dict(CHECKED["256x4"], dim_model=64, num_layers=2)
    train(checked_config(tiny), WAYS[way], checked_batch())
    floor = forget_peak()
    train(checked_config(CHECKED[size]), WAYS[way], checked_batch())
    return peak_memory() - floor


def train(config: ModelConfig, training: TrainingSetup, batch: Batch, steps: int = 3) -> None:
    model = CPMBee(config)
    model.load_state_dict(dict(initial_values(model, 0)))
    if training.quantize != "none":
        quantize_(model, FORMATS[training.quantize])
    if training.delta is not None:
        delta.insert(model, training.delta, 0)
    model.encoder.set_checkpointing(training.checkpointing)
    engine = TorchEngine(torch.device("cpu"), training.dtype)
    engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    forget_peak()  # of quantizing
    for _ in range(steps):
        engine.backward(model.loss(batch) / batch.num_targets)
        engine.step(1e-3)


def forget_peak() -> float:
    """Return free memory to the system and reset the peak; returns the current size in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def print_gpu(size: str) -> None:
    """Compare with real steps of a released size on a GPU, with random weights."""
    config = released_sizes()[size]
    batch = typical_batch(*BATCHES["1 record of 2,048"], vocab_size=config.vocab_size)
    print("| model | training | predicted, GiB | max_memory_allocated | reserved | s a step |")
    print("|---|---|---|---|---|---|")
    for name, training in [(n, t) for s, n, t in rows() if s == size]:
        try:
            figures = gpu_steps(config, training, batch)
        except torch.OutOfMemoryError:
            figures = "out of memory"
        predicted = estimate(config, training, batch).peak / GIB
        print(f"| {size} | {name} | {predicted:.2f} | {figures} |", flush=True)


def gpu_steps(config: ModelConfig, training: TrainingSetup, batch: Batch, steps: int = 5) -> str:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = TorchEngine(torch.device("cuda"), training.dtype)

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=engine.device)
        return empty.normal_(std=0.02) if dtype.is_floating_point else empty.random_(0, 128)

    model = meta_model(config, training)
    if training.quantize != "none":
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.format = FORMATS[training.quantize]  # with its kernels
    set_parameters(model, training, make)
    engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    batch = batch.to(engine.device)
    for step in range(steps):
        if step == steps - 2:
            torch.cuda.synchronize()
            started = time.perf_counter()
        with engine.autocast():
            loss = model.loss(batch)
        engine.backward(loss / batch.num_targets)
        engine.step(1e-3)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / 2
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"{allocated / GIB:.2f} | {reserved / GIB:.2f} | {seconds:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with measured peaks")
    parser.add_argument("--gpu", choices=released_sizes(), help="compare with real steps on a GPU")
    parser.add_argument("--tolerance", type=float, default=0.10, help="of --check")
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(*arguments.measure))
        return 0
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch finds no GPU")
    if arguments.gpu:
        print_gpu(arguments.gpu)
        return 0
    if arguments.check:
        return 0 if check(arguments.tolerance) else 1
    for name, (lengths, num_targets) in BATCHES.items():
        print(f"\n{name} tokens\n")
        print_table(typical_batch(lengths, num_targets, vocab_size=86_583))
    return 0


if __name__ == "__main__":
    sys.exit(main())
