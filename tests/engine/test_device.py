"""What a run computes on and in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cpm_bee.engine import bmtrain_engine, device
from cpm_bee.engine.device import choose_device, choose_dtype, free_memory, use_device
from cpm_bee.engine.select import choose_engine
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


@pytest.mark.parametrize(
    ("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (12, torch.bfloat16)]
)
def test_only_gpus_with_bf16_arithmetic_get_it(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype
) -> None:
    """By PyTorch's own answer for the GPU: one of compute capability 7 can emulate bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda *_: True)
    assert torch.cuda.is_bf16_supported()
    assert choose_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_is_used_without_the_attention_of_cudnn(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert choose_device(name).type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_bmtrain_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bmtrain_engine, "unavailable_reason", lambda device: None)
    assert choose_engine("bmtrain", CPU, "none", []) == "bmtrain"
    for wanted in ("auto", "torch"):
        assert choose_engine(wanted, CPU, "none", []) == "torch"
    with pytest.raises(InputError, match=r"--engine bmtrain: .*--compile"):
        choose_engine("bmtrain", CPU, "none", ["--compile"])


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
