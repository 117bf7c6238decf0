"""Tensors of mapped files into the parameters of a model: the values, what is read, the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from properties import examples
from safetensors.torch import save_file
from support import ROOT
from torch import nn

from cpm_bee.checkpoint import loading as module
from cpm_bee.checkpoint.loading import (
    copy_values,
    drop_pages,
    load_into,
    on_device,
    set_parameter,
)
from cpm_bee.checkpoint.reader import Checkpoint, LazyTensor

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux")
CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces in small tensors."""
    monkeypatch.setattr(module, "_PIECE", 256)


def save_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def save_old(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def mapped(tensors: Tensors, path: Path) -> Tensors:
    save_bin(tensors, path)
    return {name: entry.read() for name, entry in Checkpoint(path).entries.items()}


def resident_file_memory() -> int:
    """Bytes of mapped files in memory, of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssFile")).split()[1])


# ------------------------------------------------------------------ values


@examples(40, HealthCheck.function_scoped_fixture)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=5),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    save=st.sampled_from(["bin", "old", "safetensors"]),
)
def test_any_tensors_in_any_type(
    tmp_path: Path,
    small_pieces: None,
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
    for name, tensor in tensors.items():
        found = on_device(sources[name], CPU, dtype)
        assert found.dtype == dtype and found.shape == tensor.shape
        assert torch.equal(found, tensor.to(dtype)), name
        assert (found.data_ptr() == sources[name].data_ptr()) == (stored == dtype)


def test_views_of_one_storage(tmp_path: Path, small_pieces: None) -> None:
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
    for name, tensor in tensors.items():
        assert torch.equal(on_device(sources[name], CPU, torch.float32), tensor.float()), name


def test_tensors_of_no_file(small_pieces: None) -> None:
    for tensor in (torch.randn(300).half(), torch.randn(20, 20).half().T, torch.tensor(3.5)):
        assert torch.equal(on_device(tensor, CPU, torch.bfloat16), tensor.bfloat16())
        assert torch.equal(on_device(tensor, CPU, tensor.dtype), tensor)


def test_copies_into_any_layout(small_pieces: None) -> None:
    source = torch.randn(40, 30).half()
    for target in (torch.empty(40, 30), torch.empty(30, 40).T, torch.empty(40, 60)[:, ::2]):
        copy_values(target, source)
        assert torch.equal(target, source.float())


def test_no_gradient_goes_into_a_copy() -> None:
    parameter = nn.Parameter(torch.randn(5).half())
    for dtype in (torch.float16, torch.float32):
        assert on_device(parameter, CPU, dtype).requires_grad is False
    target = nn.Parameter(torch.zeros(5))
    copy_values(target, parameter)
    assert target.is_leaf and target.requires_grad and torch.equal(target, parameter.float())


# ------------------------------------------------------------------ parameters


def small_model() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4, bias=False)))
    model[0].requires_grad_(False)
    return model.to(torch.bfloat16)


def test_parameters_keep_their_type_and_whether_they_are_trained() -> None:
    model = small_model()
    set_parameter(model, "0.bias", torch.ones(2))  # of any type
    assert model[0].bias.dtype == torch.float32
    values = {
        "0.weight": torch.randn(2, 3),
        "1.0.weight": torch.randn(4, 2),
        "0.bias": torch.ones(2),
    }
    load_into(model, [(n, LazyTensor.of(v)) for n, v in values.items()], CPU)
    found = dict(model.named_parameters())
    assert [p.requires_grad for p in found.values()] == [False, False, True]
    assert [p.dtype for p in found.values()] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert all(torch.equal(p, values[n].to(p.dtype)) for n, p in found.items())


def test_other_parameters_are_left_alone() -> None:
    model = small_model()
    load_into(model, [("0.bias", LazyTensor.of(torch.ones(2)))], CPU)
    assert [p.is_meta for p in model.parameters()] == [True, False, True]


# ------------------------------------------------------------------ the file


@linux
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_rows_read_nothing_else(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the kernel can: it maps what is around a page too, up to 2 MiB."""
    monkeypatch.setattr(module, "drop_pages", lambda tensor: None)  # or nothing would be seen
    values = torch.randn(12_000, 3, 1000).half()  # 72 MB
    path = tmp_path / f"t.{form}"
    (save_bin if form == "bin" else save_file)({"t": values, "u": values + 1}, path)
    entry = Checkpoint(path).entries["t"]
    ranges = (0, 10), (1001, 2003), (11_990, 12_000), (11_990, 13_000), (7, 7), (12_001, 12_003)
    for begin, end in ranges:
        rows = entry.rows(begin, end)
        expected = values[begin:end]
        assert rows.shape == tuple(expected.shape) and rows.dtype == torch.float16
        target = torch.zeros(expected.shape)
        before = resident_file_memory()
        copy_values(target, rows.read())
        assert resident_file_memory() - before < expected.nbytes + (5 << 20)
        assert torch.equal(target, expected.float())
    part = entry.rows(100, 200).rows(10, 20)
    assert torch.equal(part.read(), values[110:120])


def test_a_file_that_was_replaced_since(tmp_path: Path) -> None:
    """What is mapped is the old one: the new one's bytes must not be taken for it."""
    path = tmp_path / "t.bin"
    old = torch.randn(3000).half()
    sources = mapped({"a": old}, path)
    save_bin({"a": old + 1}, tmp_path / "new.bin")
    os.replace(tmp_path / "new.bin", path)
    assert torch.equal(on_device(sources["a"], CPU, torch.float32), old.float())
    path.unlink()
    assert torch.equal(on_device(sources["a"], CPU, torch.float32), old.float())


# ------------------------------------------------------------------ memory

SIZE = 4 << 20


@linux
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_pages_of_a_file_are_dropped_and_come_back(tmp_path: Path, form: str) -> None:
    values = torch.arange(SIZE, dtype=torch.float32)
    path = tmp_path / f"t.{form}"
    (save_bin if form == "bin" else save_file)({"x": values}, path)
    mapped = Checkpoint(path).entries["x"].read()
    assert torch.equal(mapped, values)
    before = resident_file_memory()
    drop_pages(mapped)
    assert before - resident_file_memory() > 0.9 * values.nbytes
    assert torch.equal(mapped, values)


def test_other_memory_is_left_alone() -> None:
    values = torch.arange(SIZE, dtype=torch.float32)
    drop_pages(values)
    assert torch.equal(values, torch.arange(SIZE, dtype=torch.float32))


MEASURE = """
import sys, torch
from process_memory import peak_memory
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.loading import on_device
path, how = sys.argv[1:]
CPU = torch.device("cpu")
torch.set_num_threads(4)
on_device(torch.ones(1 << 16), CPU, torch.half)  # what the threads themselves take
floor = peak_memory()
kept = []
for entry in Checkpoint(path).entries.values():
    kept.append(on_device(entry.read(), CPU, torch.float32))
    if how == "each":
        kept.clear()
print(peak_memory() - floor)
"""


@pytest.mark.slow
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
