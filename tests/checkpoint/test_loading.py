"""Tensors of mapped files onto a device in a type: the values, the bytes read, the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import ROOT

from cpm_bee.checkpoint import loading as module
from cpm_bee.checkpoint.loading import transfer
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.errors import InputError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux")
CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in small tensors, over several threads."""
    monkeypatch.setattr(module, "_CHUNK", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def save_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def save_old(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def mapped(tensors: Tensors, path: Path) -> Tensors:
    save_bin(tensors, path)
    return {name: entry.read() for name, entry in Checkpoint(path).entries.items()}


def bytes_read() -> int:
    """By this process, through calls that read; faults of a mapping are not among them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


# ------------------------------------------------------------------ values


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=5),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    save=st.sampled_from(["bin", "old", "safetensors"]),
)
def test_any_tensors_in_any_type(
    tmp_path: Path,
    small_chunks: None,
    shapes: list[list[int]],
    stored: torch.dtype,
    dtype: torch.dtype,
    save: str,
) -> None:
    writers: dict[str, Callable] = {"bin": save_bin, "old": save_old, "safetensors": save_file}
    path = tmp_path / ("t.safetensors" if save == "safetensors" else "t.bin")
    tensors = {f"t{i}": torch.randn(shape).to(stored) for i, shape in enumerate(shapes)}
    writers[save](tensors, path)
    sources = {name: entry.read() for name, entry in Checkpoint(path).entries.items()}
    found = transfer(sources, CPU, dtype)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor.to(dtype)), name
        assert (found[name].data_ptr() == sources[name].data_ptr()) == (stored == dtype)


def test_views_of_one_storage(tmp_path: Path, small_chunks: None) -> None:
    whole = torch.randn(60, 50).half()
    tensors = {
        "whole": whole,
        "turned": whole.T,
        "columns": whole[:, 3:7],
        "rows": whole[7:50],
        "repeated": whole[0].expand(30, 50),
        "empty": whole[:0],
    }
    sources = mapped(tensors, tmp_path / "t.bin")
    assert sources["turned"].data_ptr() == sources["whole"].data_ptr()
    assert not sources["turned"].is_contiguous()
    found = transfer(sources, CPU, torch.float32)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.float()), name


def test_tensors_of_no_file(small_chunks: None) -> None:
    tensors = {"a": torch.randn(300).half(), "b": torch.randn(20, 20).half().T}
    found = transfer(tensors, CPU, torch.float32)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())


def test_gradients_and_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    parameter = torch.nn.Parameter(torch.randn(5).half())
    assert transfer({"a": parameter}, CPU, torch.float32)["a"].requires_grad is False
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------ the file


@linux
def test_the_file_is_read_once_and_not_through_its_mapping(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(500, 2000).half() for i in range(20)}
    sources = mapped(tensors, tmp_path / "t.bin")
    before = bytes_read()
    found = transfer(sources, CPU, torch.float32)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= bytes_read() - before < size + (2 << 20)  # and the kernel's list of mappings
    assert torch.equal(found["t9"], tensors["t9"].float())


@linux
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_rows_read_nothing_else(tmp_path: Path, form: str) -> None:
    values = torch.randn(4000, 3, 1000).half()
    path = tmp_path / f"t.{form}"
    (save_bin if form == "bin" else save_file)({"t": values, "u": values + 1}, path)
    entry = Checkpoint(path).entries["t"]
    for begin, end in ((0, 10), (1001, 2003), (3990, 4000), (3990, 5000), (7, 7), (4001, 4003)):
        rows = entry.rows(begin, end)
        expected = values[begin:end]
        assert rows.shape == tuple(expected.shape) and rows.dtype == torch.float16
        before = bytes_read()
        assert torch.equal(rows.copy_to(CPU, torch.float32), expected.float())
        assert bytes_read() - before < expected.nbytes + (1 << 20)
        assert torch.equal(rows.copy_to(CPU, torch.float16), expected)
    part = entry.rows(100, 200).rows(10, 20)
    assert torch.equal(part.read(), values[110:120])


def test_a_file_that_was_replaced_since(tmp_path: Path) -> None:
    """What is mapped is the old one: the new one's bytes must not be taken for it."""
    path = tmp_path / "t.bin"
    old = torch.randn(3000).half()
    sources = mapped({"a": old}, path)
    save_bin({"a": old + 1}, tmp_path / "new.bin")
    os.replace(tmp_path / "new.bin", path)
    assert torch.equal(transfer(sources, CPU, torch.float32)["a"], old.float())
    path.unlink()
    assert torch.equal(transfer(sources, CPU, torch.float32)["a"], old.float())


@linux
def test_a_file_that_became_shorter_since(tmp_path: Path) -> None:
    """A mapping would end the process by a signal."""
    path = tmp_path / "t.bin"
    sources = mapped({"a": torch.randn(1 << 20).half()}, path)
    os.truncate(path, 1 << 20)
    with pytest.raises(InputError, match=r"t\.bin: has become shorter while it was read"):
        transfer(sources, CPU, torch.float32)


# ------------------------------------------------------------------ memory

MEASURE = """
import sys, torch
from process_memory import peak_memory
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.loading import transfer
path, how = sys.argv[1:]
CPU = torch.device("cpu")
torch.set_num_threads(4)
transfer({"a": torch.ones(9)}, CPU, torch.half)  # what the threads themselves take
floor = peak_memory()
entries = Checkpoint(path).entries
if how == "all":
    kept = transfer({n: e.read() for n, e in entries.items()}, CPU, torch.float32)
else:
    for entry in entries.values():
        entry.copy_to(CPU, torch.float32)
print(peak_memory() - floor)
"""


@linux
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("how", "kept"), [("all", 320), ("each", 4)])
def test_peak_memory(tmp_path: Path, turned: bool, how: str, kept: int) -> None:
    """Of a file of 160 MiB: what is kept in fp32 (MiB), the buffers, and little more.

    Also where the file has to be read through its mapping.
    """
    tensors = {f"t{i}": torch.ones(1024, 1024, dtype=torch.half) for i in range(80)}
    if turned:
        tensors = {name: tensor.T for name, tensor in tensors.items()}
    save_bin(tensors, tmp_path / "t.bin")
    search = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "t.bin"), how],
        env={**os.environ, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert kept <= float(done.stdout) < kept + 70
