"""The file of a quantized base: when it is made, made again, used, and done without."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import support
import tiny
import torch
import train_support
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.errors import InputError
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import PretrainedModel, load_pretrained
from cpm_bee.quantize import cache
from cpm_bee.quantize.cache import cache_path
from cpm_bee.quantize.formats import FORMATS, NF4
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.temporary_files import temporary_name

CPU = torch.device("cpu")
SIZES = {"dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 128}
RECORDS = [{"input": "春天 ab" * 3, "<ans>": "天"}, {"input": "x", "<ans>": {"a": "b", "x": ""}}]
kinds = pytest.mark.parametrize("kind", FORMATS)


def write(folder: Path, seed: int = 1, *, name: str = "pytorch_model.bin") -> Path:
    """A base of random fp16 weights; the checkpoint's path."""
    folder.mkdir(exist_ok=True)
    model = tiny.make_model(seed, **SIZES)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    tiny.write_vocabulary(folder / "vocab.txt")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder / name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "base")


def load(
    checkpoint: Path, kind: str = "nf4", dtype: torch.dtype = torch.float32
) -> PretrainedModel:
    return load_pretrained(str(checkpoint), "auto", None, dtype, CPU, quantize=kind)


def beside(checkpoint: Path, kind: str = "nf4") -> Path:
    return checkpoint.parent / f"pytorch_model.{kind}.safetensors"


def check_values(model: CPMBee, checkpoint: Path, kind: str = "nf4") -> None:
    """Every tensor is that of the checkpoint, quantized or not."""
    state = torch.load(checkpoint, weights_only=True)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        codes, absmax = FORMATS[kind].quantize(state.pop(f"{name}.weight"))
        assert torch.equal(layer.codes, codes) and torch.equal(layer.absmax, absmax)
    for name, tensor in state.items():
        assert torch.equal(model.get_parameter(name), tensor.float())


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, weight: torch.Tensor) -> None:
        raise AssertionError("quantized again")

    for format in FORMATS.values():
        monkeypatch.setattr(type(format), "quantize", refuse)


# ------------------------------------------------------------------ made and used


@pytest.fixture(autouse=True)
def all_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cpm_bee")


@kinds
def test_it_is_made_once(
    checkpoint: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(checkpoint, kind)
    assert "quantizing" in caplog.text
    caplog.clear()
    assert first.fingerprint == load(checkpoint, "none").fingerprint
    names = {p.name for p in checkpoint.parent.iterdir()}
    assert names == {checkpoint.name, "vocab.txt", "config.json", beside(checkpoint, kind).name}
    with safe_open(beside(checkpoint, kind), framework="pt") as file:
        assert file.metadata() == {
            "format": kind, "format_version": "2", "base_fingerprint": first.fingerprint,
        }  # fmt: skip
    forbid_quantizing(monkeypatch)
    second = load(checkpoint, kind)
    assert caplog.text == ""
    monkeypatch.undo()
    for base in (first, second):
        check_values(base.model, checkpoint, kind)


def test_files_of_safetensors_and_other_names(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "base", name="my.model.safetensors")
    base = load(checkpoint, dtype=torch.bfloat16)
    assert (tmp_path / "base" / "my.model.nf4.safetensors").is_file()
    assert base.model.input_embedding.weight.dtype == torch.bfloat16
    layer = base.model.encoder.layers[0].self_att.self_attention.project_q
    assert layer.absmax.dtype == torch.float32


def test_the_name_beside_an_index_of_shards() -> None:
    path = cache_path(Path("x/pytorch_model.bin.index.json"), FORMATS["int8"])
    assert path == Path("x/pytorch_model.int8.safetensors")


def test_it_stays_mapped(checkpoint: Path) -> None:
    load(checkpoint)
    layer = load(checkpoint).model.encoder.layers[0].ffn.ffn.w_out
    address = layer.codes.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith("pytorch_model.nf4.safetensors")
            return
    raise AssertionError("no mapping")


# ------------------------------------------------------------------ made again


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def fill_with_text(path: Path) -> None:
    path.write_text("春" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change_version(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        notes = {**file.metadata(), "format_version": "0"}
    save_file(load_file(path), path, notes)


def lose_a_tensor(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, notes)


def change_a_type(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    save_file({n: t.half() for n, t in load_file(path).items()}, path, notes)


@pytest.mark.parametrize(
    "spoil", [cut_off, fill_with_text, empty, change_version, lose_a_tensor, change_a_type]
)
def test_a_damaged_one(checkpoint: Path, spoil, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    load(checkpoint)
    whole = beside(checkpoint).read_bytes()
    caplog.clear()
    spoil(beside(checkpoint))
    base = load(checkpoint)
    assert "quantizing" in caplog.text
    check_values(base.model, checkpoint)
    assert beside(checkpoint).read_bytes() == whole


def test_a_changed_value_is_named_and_made_again(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint)
    path = beside(checkpoint)
    whole = path.read_bytes()
    name = "encoder.layers.1.ffn.ffn.w_out.codes"
    codes = load_file(path)[name].numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(codes) + len(codes) // 2] ^= 1
    path.write_bytes(damaged)
    caplog.clear()
    check_values(load(checkpoint).model, checkpoint)
    assert f"{path}: {name} has changed since it was written (checksum)" in caplog.text
    assert "quantizing" in caplog.text
    assert path.read_bytes() == whole
    caplog.clear()
    forbid_quantizing(monkeypatch)
    load(checkpoint)
    assert caplog.text == ""


def test_a_file_without_checksums_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it."""
    load(checkpoint)
    path = beside(checkpoint)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    del tensors["cpm_bee.crc32"]
    save_file(tensors, path, {**notes, "format_version": "1"})
    forbid_quantizing(monkeypatch)
    base = load(checkpoint)
    monkeypatch.undo()
    check_values(base.model, checkpoint)


def test_that_of_another_base(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(checkpoint)
    write(checkpoint.parent, seed=2)
    os.utime(checkpoint, (0, 0))  # the fingerprint alone must tell
    caplog.clear()
    check_values(load(checkpoint).model, checkpoint)
    assert "quantizing" in caplog.text


def test_a_change_that_the_fingerprint_does_not_see(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    name = "encoder.layers.0.ffn.ffn.w_out.weight"
    state[name][30, 60] = 77
    torch.save(state, checkpoint)
    later = beside(checkpoint).stat().st_mtime + 10
    os.utime(checkpoint, (later, later))
    after = load(checkpoint)
    assert after.fingerprint == before.fingerprint
    check_values(after.model, checkpoint)
    forbid_quantizing(monkeypatch)  # though the checkpoint's time lies in the future
    load(checkpoint)


# ------------------------------------------------------------------ done without


def test_a_folder_that_cannot_be_written(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the refusal is played.
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "atomic_file", refuse)
    base = load(checkpoint)
    message = caplog.text
    assert "permission denied" in message and "in memory" in message
    check_values(base.model, checkpoint)
    assert not beside(checkpoint).exists()


def test_a_full_disk(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_safetensors", fail)
    check_values(load(checkpoint).model, checkpoint)
    assert "no space left" in caplog.text
    assert len(list(checkpoint.parent.iterdir())) == 3  # no partial file


def test_nothing_is_left_when_it_is_interrupted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupt(self: object, weight: torch.Tensor) -> None:
        calls.append(weight)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quantize(self, weight)

    quantize = NF4.quantize
    monkeypatch.setattr(NF4, "quantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(checkpoint)
    assert len(list(checkpoint.parent.iterdir())) == 3


def test_what_a_killed_run_left_is_removed(checkpoint: Path) -> None:
    name = temporary_name(beside(checkpoint).name).replace(str(os.getpid()), "123")
    left = checkpoint.with_name(name)
    left.write_bytes(b"half")
    load(checkpoint)
    assert not left.exists() and beside(checkpoint).is_file()


def test_values_that_are_not_finite_are_named(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["encoder.layers.1.ffn.ffn.w_in.w_1.weight"][3, 4] = float("inf")
    torch.save(state, checkpoint)
    with pytest.raises(InputError, match=r"pytorch_model.bin: .*layers\.1.*w_1.*not finite"):
        load(checkpoint)


def test_sizes_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    train_support.make_model(tmp_path / "model")
    with pytest.raises(InputError, match="64"):
        load(tmp_path / "model" / "pytorch_model.bin")
    assert not beside(tmp_path / "model" / "pytorch_model.bin").exists()


def test_a_checkpoint_that_does_not_fit_is_told_as_always(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    del state["encoder.output_layernorm.weight"]
    torch.save(state, checkpoint)
    with pytest.raises(InputError, match=r"output_layernorm\.weight: is missing"):
        load(checkpoint)


# ------------------------------------------------------------------ several processes


LOAD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from cpm_bee.pretrained import load_pretrained
cpu = torch.device("cpu")
base = load_pretrained(sys.argv[1], "auto", None, torch.float32, cpu, quantize="nf4")
print(sum(p.double().sum().item() for p in base.model.parameters()))
"""


@pytest.mark.slow
def test_of_several_processes_at_once_one_makes_it(checkpoint: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT / "src"), "OMP_NUM_THREADS": "1"}
    processes = [
        forked.Popen(
            [sys.executable, "-c", LOAD, str(checkpoint)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    results = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], results
    assert len({output for output, _ in results}) == 1
    assert sum("quantizing" in errors for _, errors in results) == 1
    assert len(list(checkpoint.parent.iterdir())) == 4


# ------------------------------------------------------------------ deltas


def trained_delta(base: PretrainedModel, path: Path) -> None:
    config = delta.DeltaConfig(rank=2)
    delta.insert(base.model, config, 0)
    generator = torch.Generator().manual_seed(1)
    tensors = delta.tensors(base.model)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    delta.save(path, tensors, config, base.fingerprint, base.tokenizer.fingerprint)


def loss_of(base: PretrainedModel) -> float:
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    with torch.no_grad():
        return base.model.loss(batch).item()


@kinds
def test_a_delta_goes_from_a_quantized_base_to_the_full_one_and_back(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "delta.pt"
    for made_on, used_on in ((kind, "none"), ("none", kind)):
        trained_delta(load(checkpoint, made_on), path)
        losses = []
        for used in (made_on, used_on):
            base = load(checkpoint, used)
            without = loss_of(base)
            delta.load(base.model, path, base.fingerprint, base.tokenizer.fingerprint)
            losses.append(loss_of(base))
            assert abs(losses[-1] - without) > 0.01
        assert losses[0] == pytest.approx(losses[1], rel=0.2)
        shutil.move(path, tmp_path / f"{made_on}.pt")
