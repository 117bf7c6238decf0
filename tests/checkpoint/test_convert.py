from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import forked
import pytest
import torch
from folders import bits, make_base, make_delta, read_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import run_script

from cpm_bee.checkpoint.convert import convert
from cpm_bee.checkpoint.model_folder import split_into_shards
from cpm_bee.checkpoint.options import ConvertOptions
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.writer import StoredTensor
from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(source: Path, to: str, output: Path, **values: Any) -> Path:
    flags = ["--input", source, "--to", to, "--output", output]
    for name, value in values.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", value]
    convert(ConvertOptions.parse([str(flag) for flag in flags]))
    return output


def refusal(*arguments: Any, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        run(*arguments, **values)
    return str(caught.value)


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, folders.PRUNED], ids=["whole", "pruned"])
@pytest.mark.parametrize("shard_size", [5, 3e-6])
def test_from_native_and_back(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any], shard_size: float
) -> None:
    base = make_base(tmp_path / "base", dtype, **changes)
    theirs = run(base, "huggingface", tmp_path / "hf", **{"shard-size": shard_size})
    native = run(theirs, "native", tmp_path / "native")
    assert bits(base) == bits(theirs) == bits(native)
    original = torch.load(base / "pytorch_model.bin", weights_only=True)
    back = torch.load(native / "pytorch_model.bin", weights_only=True)
    assert list(back) == list(original)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in original.items())
    configs = [ModelConfig.load(folder / "config.json") for folder in (base, theirs, native)]
    assert configs[0] == configs[1] == configs[2]
    prints = {folders.load(folder).fingerprint for folder in (base, theirs, native)}
    assert len(prints) == 1
    for folder in (theirs, native):
        assert (folder / "vocab.txt").read_bytes() == (base / "vocab.txt").read_bytes()
    assert (len(list(theirs.glob("*.safetensors"))) == 1) == (shard_size == 5)


@pytest.mark.parametrize("shard_size", [5, 3e-6])
def test_from_hugging_face_and_back(tmp_path: Path, shard_size: float) -> None:
    """As released: a .bin file with lm_head.weight, and a config with fields of its own."""
    base = make_base(tmp_path / "base", torch.float16)
    source = tmp_path / "release"
    source.mkdir()
    tensors = torch.load(base / "pytorch_model.bin", weights_only=True)
    named = {f"cpmbee.{name}": tensor for name, tensor in tensors.items()}
    torch.save(
        {**named, "lm_head.weight": tensors["input_embedding.weight"]}, source / "pytorch_model.bin"
    )
    shutil.copy(base / "vocab.txt", source)
    own = {"model_type": "cpmbee", "auto_map": {"AutoModel": "x.Y"}, "init_std": 1.0}
    config = ModelConfig.load(base / "config.json").to_hugging_face()
    folders.write_json(source / "config.json", {**own, **config})
    native = run(source, "native", tmp_path / "native")
    back = run(native, "huggingface", tmp_path / "back", **{"shard-size": shard_size})
    again = run(source, "huggingface", tmp_path / "again")
    found: dict[str, torch.Tensor] = {}
    for path in back.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert read_json(native / "config.json").keys() == read_json(base / "config.json").keys()
    assert read_json(back / "config.json").items() >= config.items()
    assert read_json(again / "config.json").items() >= {**own, **config}.items()
    assert read_json(again / "config.json")["architectures"] == ["CpmBeeForCausalLM"]


def test_the_index_of_shards(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    theirs = run(base, "huggingface", tmp_path / "hf", **{"shard-size": 5e-6})
    index = read_json(theirs / "model.safetensors.index.json")
    entries = Checkpoint(base).entries
    total = sum(torch.Size(e.shape).numel() * 4 for e in entries.values())
    assert index["metadata"] == {"total_size": total}
    assert list(index["weight_map"]) == [f"cpmbee.{name}" for name in entries]
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name in files:
        with safe_open(theirs / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
        assert {key for key, n in index["weight_map"].items() if n == name} == held.keys()
        assert sum(held.values()) <= 5_000 or len(held) == 1


def test_shards_are_filled_in_order() -> None:
    stored = [
        StoredTensor(name, (size,), torch.int8)
        for name, size in zip("abcde", (4, 6, 1, 12, 3), strict=True)
    ]
    names = [[tensor.name for tensor in shard] for shard in split_into_shards(stored, 10)]
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]


def as_is(base: Path) -> Path:
    return base


def as_shards_without_index(base: Path) -> Path:
    tensors = torch.load(base / "pytorch_model.bin", weights_only=True)
    (base / "pytorch_model.bin").unlink()
    for i, half in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        save_file(
            {f"cpmbee.{n}": tensors[n] for n in half}, base / f"m-0000{i}-of-00002.safetensors"
        )
    return base / "m-00002-of-00002.safetensors"


def as_wrapped_file(base: Path) -> Path:
    tensors = torch.load(base / "pytorch_model.bin", weights_only=True)
    path = base / "weights.pt"
    torch.save(
        {f"module.{n}": t for n, t in tensors.items()}, path, _use_new_zipfile_serialization=False
    )
    return path


@pytest.mark.parametrize("form", [as_is, as_shards_without_index, as_wrapped_file])
def test_all_forms_can_be_converted(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    expected = bits(base)
    source = form(base)
    assert bits(run(source, "native", tmp_path / "native")) == expected
    assert bits(run(source, "huggingface", tmp_path / "hf")) == expected


# ------------------------------------------------------------------ outputs


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    output = run(base, "huggingface", tmp_path / "out")
    before = bits(output)
    assert "already exists; replace it with --overwrite" in refusal(base, "native", output)
    assert bits(output) == before
    run(base, "native", output, overwrite=True)
    assert sorted(p.name for p in output.iterdir()) == [
        "config.json", "pytorch_model.bin", "vocab.txt",
    ]  # fmt: skip
    (output / "thesis.docx").touch()
    assert "holds other files than a model (thesis.docx)" in refusal(
        base, "native", output, overwrite=True
    )
    assert (output / "thesis.docx").exists()


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_the_input_is_never_the_output(tmp_path: Path, to: str) -> None:
    base = make_base(tmp_path / "base")
    before = bits(base)
    (tmp_path / "link").symlink_to(base)
    for source in (base, base / "pytorch_model.bin", tmp_path / "link"):
        for output in (base, tmp_path / "link", tmp_path):
            assert "which is read" in refusal(source, to, output, overwrite=True)
    assert bits(base) == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space"):
        run(base, "native", tmp_path / "new" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_flags_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    out = tmp_path / "out"
    assert "--to huggingface" in refusal(base, "native", out, **{"shard-size": 1})
    assert "--to peft" in refusal(base, "native", out, **{"delta-alpha": 1})
    assert "--input" in refusal(base, "native", out, load=base)
    assert "--load" in refusal(base, "peft", out, vocab=base / "vocab.txt")
    assert not out.exists()


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    out = tmp_path / "out"
    assert "is a delta; --to peft" in refusal(file, "native", out)
    assert "needs a delta file" in refusal(base, "peft", out)
    assert "not a delta file" in refusal(base / "pytorch_model.bin", "peft", out)
    assert "not a PEFT adapter folder" in refusal(base, "delta", out)
    adapter = run(file, "peft", tmp_path / "adapter")
    assert "--to delta makes a delta" in refusal(adapter, "native", out)
    assert not out.exists()


def test_the_printed_command_runs(tmp_path: Path) -> None:
    """Also with a space in the name."""
    base = make_base(tmp_path / "base")
    arguments = ["--input", base, "--to", "huggingface", "--output", tmp_path / "my model"]
    done = run_script("src/convert_checkpoint.py", *arguments)
    assert done.returncode == 0, done.stderr
    record = '{"input": "abc", "<ans>": ""}\n'
    answered = forked.run(
        folders.printed_command(done.stdout), input=record, capture_output=True, encoding="utf-8"
    )
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.startswith('{"input": "abc", "<ans>": ')
