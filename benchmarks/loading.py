"""Measure loading: a generated native checkpoint (fp16) made ready for training in fp32 on the CPU.

    python benchmarks/loading.py [--gigabytes 2] [--format bin|safetensors]

Compares the time with that of reading the file, and the peak memory with the model's own size.
Loading runs in a process of its own. Before each phase the file is dropped from the page cache, so
that both read the disk; --warm leaves it there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from memory import peak_memory

SIZES = {"vocab_size": 30000, "dim_model": 2048, "num_heads": 16, "dim_head": 128, "dim_ff": 5120}


def make(path: Path, gigabytes: float) -> int:
    """Write a checkpoint of about so many GB (1e9 bytes); returns the number of its values."""
    import torch

    from cpm_bee.checkpoint import save_tensors
    from cpm_bee.model.config import ModelConfig
    from cpm_bee.model.network import CPMBee

    def build(layers: int) -> CPMBee:
        with torch.device("meta"):
            return CPMBee(ModelConfig(num_layers=layers, **SIZES))

    def count(layers: int) -> int:
        return sum(p.numel() for p in build(layers).parameters())

    layers = max(1, round((gigabytes * 5e8 - count(1)) / (count(2) - count(1))))
    model = build(layers)
    tensors = {n: torch.randn(p.shape).half() for n, p in model.named_parameters()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        save_tensors(path, tensors)
    return count(layers)


def load(path: Path) -> None:
    """Runs in a process of its own; prints seconds and MiB above the import floor."""
    import torch

    from cpm_bee.base import load_weights
    from cpm_bee.checkpoint import Checkpoint
    from cpm_bee.derive import derive_config
    from cpm_bee.model.network import CPMBee

    floor = peak_memory()
    started = time.perf_counter()
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = CPMBee(derive_config(checkpoint))
    load_weights(model, checkpoint, torch.float32, torch.device("cpu"))
    checkpoint.fingerprint()
    print(json.dumps({"seconds": time.perf_counter() - started, "mib": peak_memory() - floor}))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> float:
    """Seconds to read the file from beginning to end."""
    buffer = bytearray(16 << 20)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--warm", action="store_true", help="leave the file in the page cache")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        name = "pytorch_model.bin" if arguments.format == "bin" else "model.safetensors"
        path = Path(folder) / name
        values = make(path, arguments.gigabytes)
        prepare = read if arguments.warm else forget
        prepare(path)
        reading = read(path)
        prepare(path)
        command = [sys.executable, __file__, "--load", str(path)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        model = values * 4 / 2**20
        print(f"{name}: {path.stat().st_size / 1e9:.2f} GB, model of {model:.0f} MiB in fp32")
        print(f"reading the file: {reading:.2f} s, ready for training: {result['seconds']:.2f} s "
              f"({result['seconds'] / reading:.2f} x)")  # fmt: skip
        print(f"peak memory beyond the model: {result['mib'] - model:.0f} MiB")


if __name__ == "__main__":
    main()
