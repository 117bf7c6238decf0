from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from cpm_bee.checkpoint.reader import Checkpoint, load_tensors, save_tensors
from cpm_bee.errors import InputError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return dict(tiny.make_model(1).state_dict())


def hugging_face(tensors: Tensors) -> Tensors:
    named = {f"cpmbee.{name}": tensor for name, tensor in tensors.items()}
    return {**named, "lm_head.weight": tensors["input_embedding.weight"].clone()}


def native(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path / "pytorch_model.bin")
    return path / "pytorch_model.bin"


def old_format(path: Path, tensors: Tensors) -> Path:
    """As torch wrote before 1.6: no zip archive, and it cannot be mapped."""
    torch.save(tensors, path / "model.pt", _use_new_zipfile_serialization=False)
    return path / "model.pt"


def safetensors(path: Path, tensors: Tensors) -> Path:
    save_file(hugging_face(tensors), path / "model.safetensors")
    return path / "model.safetensors"


def prefixed(path: Path, tensors: Tensors) -> Path:
    return native(path, hugging_face(tensors))


def as_shards(path: Path, tensors: Tensors, ending: str, save: Callable) -> Path:
    names = sorted(tensors)
    weight_map = {}
    for i, own in enumerate((names[::2], names[1::2])):
        shard = f"shard-{i + 1}-of-2.{ending}"
        save({name: tensors[name] for name in own}, path / shard)
        weight_map |= dict.fromkeys(own, shard)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    index = path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def sharded_bin(path: Path, tensors: Tensors) -> Path:
    return as_shards(path, hugging_face(tensors), "bin", torch.save)


def sharded_safetensors(path: Path, tensors: Tensors) -> Path:
    return as_shards(path, hugging_face(tensors), "safetensors", save_file)


FORMS = [native, old_format, prefixed, safetensors, sharded_bin, sharded_safetensors]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_folder", [False, True])
def test_forms(
    tmp_path: Path, tensors: Tensors, form: Callable, dtype: torch.dtype, by_folder: bool
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = form(tmp_path, tensors)
    if by_folder and form is old_format:
        path = path.rename(tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path if by_folder else path)
    assert checkpoint.path == path
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in tensors.items():
        entry = checkpoint.entries[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), dtype)
        assert torch.equal(entry.read(), tensor)


def test_fingerprints(tmp_path: Path, tensors: Tensors) -> None:
    """The same for all forms, and for fp32 and its rounding to fp16; other for other weights."""
    found = set()
    for i, form in enumerate(FORMS):
        for dtype in (torch.float32, torch.float16):
            folder = tmp_path / f"{i}-{dtype}"
            folder.mkdir()
            path = form(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})
            found.add(Checkpoint(path).fingerprint())
    assert len(found) == 1
    changed = []
    for name in ("input_embedding.weight", "encoder.output_layernorm.weight"):
        for place in (0, -1):
            other = {n: tensor.clone() for n, tensor in tensors.items()}
            other[name].view(-1)[place] += 1
            changed.append(Checkpoint(native(tmp_path, other)).fingerprint())
    fewer = dict(tensors)
    del fewer["encoder.output_layernorm.weight"]
    changed.append(Checkpoint(native(tmp_path, fewer)).fingerprint())
    turned = {n: t.reshape(t.shape[::-1]) if t.dim() == 2 else t for n, t in tensors.items()}
    changed.append(Checkpoint(native(tmp_path, turned)).fingerprint())
    assert len({*found, *changed}) == 7


def test_a_folder_prefers_the_most_complete(tmp_path: Path, tensors: Tensors) -> None:
    for form in (native, safetensors, sharded_bin, sharded_safetensors):
        form(tmp_path, tensors)
    for name in ("model.safetensors.index.json", "model.safetensors"):
        assert Checkpoint(tmp_path).path.name == name
        (tmp_path / name).unlink()
    assert Checkpoint(tmp_path).path.name == "pytorch_model.bin.index.json"
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="a folder without a checkpoint"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"no such checkpoint\..*--load ckpts/cpm-bee-tiny"):
        Checkpoint(tmp_path / "nothing.bin")


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("form", [native, safetensors, sharded_bin, sharded_safetensors])
def test_values_are_mapped_not_copied(tmp_path: Path, form: Callable) -> None:
    """Reading 100 MB takes next to no memory of its own; a copy would."""
    size = 12 << 20
    embedding = torch.ones(size, 1)
    path = form(tmp_path, {"input_embedding.weight": embedding, "a": embedding + 1})
    del embedding
    before = tiny.anonymous_memory()
    tensors = {name: entry.read() for name, entry in Checkpoint(path).entries.items()}
    touched = {name: tensor[::1024].sum().item() for name, tensor in tensors.items()}
    assert touched == {"input_embedding.weight": size / 1024, "a": 2 * size / 1024}
    assert tiny.anonymous_memory() - before < 20 << 20
    tensors["a"][0] = 5  # copy on write: the file stays as it is
    assert Checkpoint(path).entries["a"].read()[0].item() == 2


# ------------------------------------------------------------------ refused


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.filterwarnings("ignore")  # what torch says of such files
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("as_shard", [False, True])
def test_code_is_never_run(tmp_path: Path, form: str, as_shard: bool) -> None:
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "witness"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"a": Evil(witness)}))
    else:
        torch.save({"a": Evil(witness)}, path, _use_new_zipfile_serialization=form == "zip")
    if as_shard:
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(InputError, match=r"pytorch_model\.bin: contains something other than"):
        Checkpoint(tmp_path)
    assert not witness.exists()


TEXTS = {"pointer": b"version https://git-lfs\n", "page": b"<html>", "empty": b"", "code": b"cos\n"}


@pytest.mark.parametrize("content", TEXTS.values(), ids=list(TEXTS))
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    for name, reason in (
        ("a.bin", "not a checkpoint, but a file that begins with"),
        ("a.safetensors", "not a safetensors file"),
        ("a.bin.index.json", "not an index of shards"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=reason) as caught:
            Checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [native, old_format, safetensors])
def test_damaged_files_are_refused_with_the_path(
    tmp_path: Path, tensors: Tensors, form: Callable
) -> None:
    path = form(tmp_path, tensors)
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(120):
        damaged = bytearray(data)
        if i % 3 == 0:
            del damaged[rng.randrange(len(data)) :]
        else:
            for _ in range(3):
                # Names and structure lie at the ends of the file.
                place = rng.choice([rng.randrange(2000), -rng.randrange(1, 2000)])
                damaged[place] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            Checkpoint(path).fingerprint()
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert i % 3, "a cut-off file was read"
    assert refused > 60


def problems(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        Checkpoint(path)
    header, *lines = str(caught.value).splitlines()
    assert header.startswith(f"{path}: ")
    return [line.strip() for line in lines]


def test_values_that_are_no_tensors_are_all_listed(tmp_path: Path) -> None:
    values = {
        "module": {"a": torch.zeros(2)},
        "step": 3,
        7: torch.zeros(2),
        "sparse": torch.eye(3).to_sparse(),
        "good": torch.zeros(2),
    }
    torch.save(values, tmp_path / "a.bin")
    assert problems(tmp_path / "a.bin") == [
        "module: is a dict, not a tensor",
        "step: is a int, not a tensor",
        "7: is not a name",
        "sparse: is sparse or has no values",
    ]
    torch.save([torch.zeros(2)], tmp_path / "b.bin")
    with pytest.raises(InputError, match="a list instead of a dictionary"):
        Checkpoint(tmp_path / "b.bin")
    torch.save({}, tmp_path / "c.bin")
    with pytest.raises(InputError, match="holds no tensors"):
        Checkpoint(tmp_path / "c.bin")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int8, torch.bool])
def test_other_types_are_all_listed(tmp_path: Path, dtype: torch.dtype) -> None:
    bad = {"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(2), "c": torch.ones(1, dtype=dtype)}
    found = problems(native(tmp_path, bad))
    assert found == [f"{n}: has type {dtype}, expected fp32, fp16 or bf16" for n in "ac"]
    save_file(bad, tmp_path / "a.safetensors")
    found = problems(tmp_path / "a.safetensors")
    name = {torch.int64: "I64", torch.float64: "F64", torch.int8: "I8", torch.bool: "BOOL"}[dtype]
    assert found == [f"{n}: has type {name}, expected F32, F16 or BF16" for n in "ac"]


def test_names_that_stand_there_twice_and_a_head_that_is_not_tied(
    tmp_path: Path, tensors: Tensors
) -> None:
    norm = "encoder.output_layernorm.weight"
    doubled = {**hugging_face(tensors), norm: tensors[norm], "lm_head.weight": torch.zeros(3, 4)}
    size = list(tensors["input_embedding.weight"].shape)
    assert problems(native(tmp_path, doubled)) == [
        f"{norm}: appears twice, with and without the prefix 'cpmbee.'",
        f"lm_head.weight: has shape [3, 4], it is tied to input_embedding.weight with {size}",
    ]


@pytest.mark.parametrize("row", [0, 3, -1])
def test_a_head_with_other_values_than_the_embedding(
    tmp_path: Path, tensors: Tensors, row: int
) -> None:
    """As a tool leaves it that unties the two and trains the head."""
    head = tensors["input_embedding.weight"].clone()
    path = native(tmp_path, {**tensors, "lm_head.weight": head.half()})
    assert "lm_head.weight" not in Checkpoint(path).entries  # equal in its own type
    head[row, 1] += 1
    path = native(tmp_path, {**tensors, "lm_head.weight": head})
    (line,) = problems(path)
    assert line.startswith("lm_head.weight: has other values than input_embedding.weight")


def write_index(tmp_path: Path, weight_map: object) -> Path:
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_an_index_reads_only_what_lies_beside_it(tmp_path: Path, tensors: Tensors) -> None:
    outside = native(tmp_path, tensors)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    native(folder / "sub", tensors)
    names = ["../pytorch_model.bin", str(outside), "sub/pytorch_model.bin", "..", "lost.bin"]
    names.append("pytorch_model.bin.index.json")  # itself
    index = write_index(folder, {f"t{i}": name for i, name in enumerate(names)})
    found = problems(index)
    for name in names[:3]:
        assert f"{name}: is not the name of a file beside the index" in found
    assert "..: is missing" in found and "lost.bin: is missing" in found
    assert "pytorch_model.bin.index.json: is an index, not a shard" in found
    assert {f"in the index only: t{i}" for i in range(6)} <= set(found)
    assert len(found) == 12


@pytest.mark.parametrize("weight_map", [None, [1], {"a": ["b"]}, {"a": 1, "b": "c"}, "text", 3])
def test_malformed_indexes(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(InputError, match=r"index\.json: not an index of shards"):
        Checkpoint(write_index(tmp_path, weight_map))


def test_a_shard_that_lacks_a_tensor(tmp_path: Path, tensors: Tensors) -> None:
    index = sharded_bin(tmp_path, tensors)
    shard = torch.load(tmp_path / "shard-1-of-2.bin", weights_only=True)
    name = next(iter(shard))
    del shard[name]
    torch.save(shard, tmp_path / "shard-1-of-2.bin")
    assert problems(index) == [f"in the index only: {name}"]


# ------------------------------------------------------------------ saving


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_tensors(path, {"a": torch.ones(2)})

    class Unsavable:
        def __reduce__(self) -> tuple:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_tensors(path, {"a": torch.zeros(2), "b": Unsavable()})
    assert load_tensors(path, "a checkpoint")["a"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# ------------------------------------------------------------------ what a download leaves

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "delta.pt"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(InputError, match=r"is a Git LFS pointer.*git lfs pull"):
        Checkpoint(path)
    if name == "delta.pt":
        with pytest.raises(InputError, match="git lfs pull"):
            load_tensors(path, "a delta file")


def numbered_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> list[Path]:
    names = sorted(tensors)
    paths = []
    for i in range(count):
        path = folder / f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save({name: tensors[name] for name in names[i::count]}, path)
        paths.append(path)
    return paths


def test_shards_without_an_index_are_joined_or_the_missing_ones_named(tmp_path: Path) -> None:
    tensors = {f"encoder.layers.{i}.weight": torch.full((2,), float(i)) for i in range(7)}
    paths = numbered_shards(tmp_path, tensors, 3)
    for given in (tmp_path, paths[1]):
        entries = Checkpoint(given).entries
        assert entries.keys() == tensors.keys()
        assert all(torch.equal(entries[name].read(), tensors[name]) for name in tensors)
    paths[0].unlink()
    paths[2].unlink()
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert f"{paths[0].name}: is missing" in str(caught.value)
    assert f"{paths[2].name}: is missing" in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "module.cpmbee.", "cpmbee."])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, prefix: str) -> None:
    torch.save({f"{prefix}input_embedding.weight": torch.ones(2, 2)}, tmp_path / "a.bin")
    assert list(Checkpoint(tmp_path / "a.bin").entries) == ["input_embedding.weight"]
