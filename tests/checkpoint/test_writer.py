from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpm_bee.checkpoint.reader import load_tensors
from cpm_bee.checkpoint.writer import StoredTensor, write_safetensors, write_torch_file

TENSORS = {
    "a.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    "b": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.float16),
    "春": torch.tensor(3.0, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "t": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
}
STORED = [StoredTensor(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]


def assert_same_bits(found: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_torch_file_is_one_for_torch(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model.bin"
    with open(path, "wb") as file:
        write_torch_file(file, STORED, TENSORS.items())
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert_same_bits(found)
    assert all(t.is_contiguous() for t in found.values())
    assert_same_bits(load_tensors(path, "a checkpoint"))


def test_the_archive_is_sound_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with open(path, "wb") as file:
        write_torch_file(file, STORED, TENSORS.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # compares checksums
        names = [f"archive/data/{i}" for i in range(len(TENSORS))]
        assert set(names) <= set(archive.namelist())
    content = path.read_bytes()
    values = bytes(TENSORS["a.weight"].view(-1).view(torch.uint8).tolist())
    assert content.index(values) % 64 == 0


def test_a_torch_file_needs_all_its_tensors_in_order(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file, pytest.raises(ValueError, match="shorter"):
        write_torch_file(file, STORED, list(TENSORS.items())[:-1])
    with open(tmp_path / "x", "wb") as file, pytest.raises(AssertionError):
        write_torch_file(file, STORED, reversed(TENSORS.items()))


def test_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        write_safetensors(file, STORED, reversed(TENSORS.items()), {"format": "pt"})
    found = load_file(path)
    assert_same_bits({name: found[name] for name in TENSORS})
