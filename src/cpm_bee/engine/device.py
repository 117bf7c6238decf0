"""The device of a run, its compute type, and the free memory."""

from __future__ import annotations

from pathlib import Path

import torch

from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import InputError

AUTO = "auto"
# Files with a container's memory limit, in control groups v2 and v1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def choose_device(name: str = AUTO) -> torch.device:
    """Returns the device of `--device`; `auto` is the GPU if there is one.

    On a GPU, it also takes cuDNN out of the choice of attention kernels for this process.

    Raises:
        InputError: this machine has no such device.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: no such device; cpu, cuda and cuda:N can be used")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no usable GPU (--device cpu works)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: the last GPU is cuda:{torch.cuda.device_count() - 1}")
    if device.type == "cuda":
        # On compute capability 9.0 and 10.0, SDPA prefers cuDNN for a mask without gradient. With
        # torch 2.13 and cuDNN 9.20, NaN gradients are reported where length % 128 == 64; and cuDNN
        # makes a plan for each new shape, tens of milliseconds each, while nearly all of our
        # batches have new shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def own_gpu(device: torch.device) -> torch.device:
    """Returns the GPU of this process: with several processes, that of its number on this machine.

    Raises:
        InputError: `device` names one GPU for all of them, or there are fewer GPUs than processes.
    """
    info = RankInfo.of_this_process()
    if device.type != "cuda" or info.world_size == 1:
        return device
    if device.index is not None:
        raise InputError(f"--device {device}: with several processes, each takes its own GPU: cuda")
    if info.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"{torch.cuda.device_count()} GPUs for more processes: --nproc_per_node is too large"
        )
    return torch.device("cuda", info.local_rank)


def use_device(device: torch.device) -> torch.device:
    """Make a GPU this process's current one; returns it with its index. Does nothing for a CPU.

    Some libraries' kernels and new streams use the current GPU, whatever their tensors are on.
    """
    if device.type != "cuda":
        return device
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the compute type of `--dtype`.

    `auto` is fp32 on a CPU, and bf16 on a GPU, or fp16 where the GPU only emulates bf16.
    """
    if name != AUTO:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type != "cuda":
        return torch.float32
    # By default, PyTorch also counts GPUs that only emulate it (V100, T4).
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Returns the bytes that this process can use on a device, including those already in use.

    Args:
        processes: the number of processes that share the machine; on a CPU each gets an equal
            share.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    unused = _kib("/proc/meminfo", "MemAvailable") * 1024
    own = _kib("/proc/self/status", "RssAnon") * 1024
    limits = [int(t) for t in map(_text, _LIMITS) if t.isdigit()]
    return min([unused // processes + own, *(limit // processes for limit in limits)])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _kib(path: str, name: str) -> int:
    line = next(line for line in _text(path).splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])
