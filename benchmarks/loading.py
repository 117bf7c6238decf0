"""Measure loading of a generated native checkpoint (fp16) for training in fp32 on the CPU.

    python benchmarks/loading.py [--gigabytes 2] [--format bin|safetensors] [--repeat 5] [--warm]
                                 [--verify]

Compares the time with that of reading the file, and the peak memory with the size of the model.
Loading runs in a separate process. Before each phase the file is dropped from the page cache, so
that both read the disk; --warm leaves it there. As a lower bound, it also measures filling new
memory of the model's size.

A virtual machine may have to get memory from its host when it is first used (here at 0.1 to 2 GB/s,
while the machine itself fills 10 GB/s). So before each phase another process uses as much memory
and frees it; --fresh skips this.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from process_memory import peak_memory

SIZES: dict[str, Any] = {
    "vocab_size": 30000,
    "dim_model": 2048,
    "num_heads": 16,
    "dim_head": 128,
    "dim_ff": 5120,
}


def make(path: Path, gigabytes: float) -> int:
    """Write a checkpoint of about that many GB (1e9 bytes); returns the number of its values."""
    import torch

    from cpm_bee.checkpoint.reader import save_tensors
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


def fetch_memory(size: int) -> None:
    """Make the host of a virtual machine provide memory, without growing this process."""
    if size == 0:
        return
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        zeros = bytes(16 << 20)
        for _ in range(size // len(zeros)):
            memory.write(zeros)
        os._exit(0)
    os.waitpid(child, 0)


def load(path: Path, size: int, verify: bool) -> None:
    """Runs in a separate process; prints seconds, and MiB above the memory after imports."""
    import safetensors  # noqa: F401 - importing is not part of loading
    import torch

    from cpm_bee.checkpoint.config_from_weights import derive_config
    from cpm_bee.checkpoint.loading import load_into
    from cpm_bee.checkpoint.reader import Checkpoint
    from cpm_bee.model.network import CPMBee

    floor = peak_memory()
    fetch_memory(size)
    started, begin = time.perf_counter(), os.times()
    checkpoint = Checkpoint(path, verify=verify)
    checkpoint.fingerprint()  # a run computes it to identify its base
    with torch.device("meta"):
        model = CPMBee(derive_config(checkpoint))
    load_into(model, checkpoint.entries.items(), torch.device("cpu"))
    seconds, end = time.perf_counter() - started, os.times()
    result = {"seconds": seconds, "mib": peak_memory() - floor}
    result |= {"user": end.user - begin.user, "system": end.system - begin.system}
    print(json.dumps(result))


def fill(values: int, size: int) -> None:
    """Runs in a separate process; prints the seconds to fill new memory with fp32 values."""
    import torch

    from cpm_bee.checkpoint.loading import use_huge_pages

    fetch_memory(size)
    started = time.perf_counter()
    memory = torch.empty(values)
    use_huge_pages(memory)
    memory.fill_(1)
    print(json.dumps(time.perf_counter() - started))


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


def run_apart(*arguments: object) -> Any:
    """Run this script with other arguments; returns the JSON that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--verify", action="store_true", help="compare the file with its checksums")
    parser.add_argument("--warm", action="store_true", help="leave the file in the page cache")
    parser.add_argument(
        "--repeat", type=int, default=5, help="number of repeats; the best one counts (5)"
    )
    parser.add_argument("--fresh", action="store_true", help="memory as the host provides it")
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(arguments.load, arguments.size, arguments.verify)
    if arguments.fill:
        return fill(arguments.fill, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        name = "pytorch_model.bin" if arguments.format == "bin" else "model.safetensors"
        path = Path(folder) / name
        values = make(path, arguments.gigabytes)
        prepare = read if arguments.warm else forget
        model = values * 4 / 2**20
        size = 0 if arguments.fresh else values * 4 + path.stat().st_size
        print(f"{name}: {path.stat().st_size / 1e9:.2f} GB, model of {model:.0f} MiB in fp32")
        reading, filling, loading, peak = [], [], [], 0.0
        for _ in range(arguments.repeat):
            fetch_memory(size)
            prepare(path)
            reading.append(read(path))
            filling.append(run_apart("--fill", values, "--size", size))
            prepare(path)
            verify = ["--verify"] if arguments.verify else []
            result = run_apart("--load", path, "--size", size, *verify)
            loading.append(result["seconds"])
            peak = max(peak, result["mib"] - model)
            print(f"  reading {reading[-1]:.2f} s, filling {filling[-1]:.2f} s, "
                  f"ready {result['seconds']:.2f} s (user {result['user']:.2f} s, "
                  f"system {result['system']:.2f} s), load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"best: reading {min(reading):.2f} s, filling {min(filling):.2f} s, "
          f"ready {min(loading):.2f} s ({min(loading) / min(reading):.2f} x reading)")  # fmt: skip
    print(f"peak memory beyond the model: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
