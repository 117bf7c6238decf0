"""Dropping the pages of mapped tensors, and of nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cpm_bee.checkpoint.mapped_pages import drop_pages

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux")
SIZE = 4 << 20


def resident_file_memory() -> int:
    """Bytes of mapped files in memory, of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssFile")).split()[1])


@linux
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_pages_of_a_file_are_dropped_and_come_back(tmp_path: Path, kind: str) -> None:
    values = torch.arange(SIZE, dtype=torch.float32)
    path = tmp_path / f"t.{kind}"
    if kind == "bin":
        torch.save({"x": values}, path)
        mapped = torch.load(path, mmap=True, weights_only=True)["x"]
    else:
        save_file({"x": values}, path)
        mapped = safe_open(path, framework="pt").get_tensor("x")
    assert torch.equal(mapped, values)
    before = resident_file_memory()
    drop_pages(mapped)
    assert before - resident_file_memory() > 0.9 * values.nbytes
    assert torch.equal(mapped, values)


def test_other_memory_is_left_alone() -> None:
    values = torch.arange(SIZE, dtype=torch.float32)
    drop_pages(values)
    assert values[-1] == SIZE - 1 and values[1024] == 1024
