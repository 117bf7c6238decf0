"""What a run computes on and in."""

from __future__ import annotations

import pytest
import torch

from cpm_bee.engine import device
from cpm_bee.engine.device import choose_device, choose_dtype, free_memory, use_device
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import InputError

CPU = torch.device("cpu")


def test_types_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(InputError, match="--device cuda: this machine has no usable GPU"):
        choose_device("cuda")
    with pytest.raises(InputError, match="--device toaster: no such device"):
        choose_device("toaster")
    names = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    names["fp16"] = torch.float16
    assert {name: choose_dtype(name, CPU) for name in names} == names
    gpu = torch.device("cuda")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda s=supported: s)
        assert choose_dtype("auto", gpu) == dtype


def test_the_gpu_of_a_run_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert use_device(CPU) == CPU
    assert use_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert made == []
    second = torch.device("cuda", 1)
    assert TorchEngine(second, torch.float32).device == second
    assert made == [second]


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB",
        "/proc/self/status": "RssAnon:\t100 kB",
        "/sys/fs/cgroup/memory.max": "max",
    }
    monkeypatch.setattr(device, "_text", lambda path: texts.get(path, ""))
    assert free_memory(CPU) == 900 * 1024
    assert free_memory(CPU, processes=4) == 300 * 1024
    texts["/sys/fs/cgroup/memory.max"] = str(500 * 1024)
    assert free_memory(CPU) == 500 * 1024


def test_free_memory_here() -> None:
    assert 1 << 26 < free_memory(CPU) < 1 << 50
