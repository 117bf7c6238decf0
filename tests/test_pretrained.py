"""The base model: checkpoint, config and vocabulary, each checked against the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from cpm_bee.checkpoint.config_from_weights import derive_config
from cpm_bee.checkpoint.loading import load_into
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.data.batch import collate
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import (
    PretrainedModel,
    load_pretrained,
)

CPU = torch.device("cpu")
MASKS = ((False, True), (True, True), (True, False))


@pytest.fixture
def model() -> CPMBee:
    return tiny.make_model(1)


@pytest.fixture
def folder(tmp_path: Path, model: CPMBee) -> Path:
    """A checkpoint with its config and vocabulary, in Hugging Face's names of files."""
    return write(tmp_path / "base", model)


def write(folder: Path, model: CPMBee, *, config: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tiny.write_vocabulary(folder / "vocab.txt")
    if config:
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def load(
    path: Path | None, config: str | Path = "auto", vocab: str | Path | None = None, **options: Any
) -> PretrainedModel:
    dtype = options.pop("dtype", torch.float32)
    names = [None if value is None else str(value) for value in (path, vocab)]
    return load_pretrained(names[0], str(config), names[1], dtype, CPU, **options)


def refusal(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(*args, **options)
    return [line.strip() for line in str(caught.value).splitlines()]


def same_results(a: CPMBee, b: CPMBee) -> bool:
    record = {"input": "春 é" * 9, "<ans>": "é 天"}
    batch = collate(tiny.encode([record]), tiny.TOKENIZER)
    with torch.no_grad():
        return torch.equal(a.eval()(batch), b.eval()(batch))


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_types(folder: Path, model: CPMBee, stored: torch.dtype, dtype: torch.dtype) -> None:
    state = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    loaded = load(folder, dtype=dtype).model
    assert loaded.config == model.config
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name].to(dtype)), name
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


@pytest.mark.parametrize("masks", [(), MASKS])
def test_the_loaded_model_is_the_saved_one(tmp_path: Path, masks: tuple) -> None:
    model = tiny.make_model(2, num_layers=3, mask_modules=masks)
    folder = write(tmp_path / "base", model)
    base = load(folder)
    assert base.model.config == model.config
    assert base.tokenizer.tokens == tiny.TOKENIZER.tokens
    assert same_results(base.model, model)
    given = load(folder / "pytorch_model.bin", folder / "config.json", folder / "vocab.txt")
    assert same_results(given.model, model)
    assert given.fingerprint == base.fingerprint == Checkpoint(folder).fingerprint()


def test_training_does_not_write_to_the_checkpoint(folder: Path, model: CPMBee) -> None:
    """Weights of the file's own type are mapped: a step must stay in memory."""
    base = load(folder)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.add_(1)
    assert same_results(load(folder).model, model)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_loading_takes_no_second_copy(tmp_path: Path, form: str) -> None:
    model = tiny.make_model(0, dim_ff=800_000, num_layers=1)  # 115 MB
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "model.bin")
    else:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = model.config
    del model
    before = tiny.anonymous_memory()
    with torch.device("meta"):
        loaded = CPMBee(config)
    load_into(loaded, Checkpoint(tmp_path / f"model.{form}").entries.items(), CPU)
    assert sum(p[::64].sum().item() for p in loaded.parameters()) != 0
    assert tiny.anonymous_memory() - before < 20 << 20
    assert len(list(loaded.parameters())) == 12


def test_what_does_not_fit_is_all_listed(folder: Path, model: CPMBee) -> None:
    state = model.state_dict()
    first, second = "encoder.layers.0.ffn.ffn.w_out.weight", "encoder.output_layernorm.weight"
    del state[first], state[second]
    state["encoder.layers.1.ffn.ffn.w_2.weight"] = torch.zeros(2)
    third = "encoder.layers.1.self_att.self_attention.project_k.weight"
    state[third] = torch.zeros(10, 11)
    torch.save(state, folder / "pytorch_model.bin")
    for config in ("auto", folder / "config.json"):
        header, *lines = refusal(folder, config)
        assert header == f"{folder / 'pytorch_model.bin'}: does not fit the model:"
        assert lines == [
            f"{first}: is missing",
            "encoder.layers.1.ffn.ffn.w_2.weight: is unexpected",
            f"{third}: has shape [10, 11], expected [10, 12]",
            f"{second}: is missing",
        ]


# ------------------------------------------------------------------ config


def derived(folder: Path) -> ModelConfig:
    return derive_config(Checkpoint(folder))


@pytest.mark.parametrize("masks", [(), MASKS])
def test_sizes_are_read_from_the_tensors(tmp_path: Path, masks: tuple) -> None:
    buckets = {"position_bias_num_buckets": 256, "position_bias_num_segment_buckets": 256}
    model = tiny.make_model(2, num_layers=3, mask_modules=masks, **buckets)
    config = derived(write(tmp_path / "base", model, config=False))
    assert config == replace(model.config, position_bias_max_distance=2048)


def test_what_no_tensor_tells_is_read_beside(tmp_path: Path) -> None:
    """In Hugging Face's names, with other sizes than the tensors, which win."""
    model = tiny.make_model(0)
    folder = write(tmp_path / "base", model)
    told = {"eps": 1e-3, "dropout_p": 0.25, "distance_scale": 4, "half": True}
    told |= {"position_bias_num_buckets": 12, "position_bias_num_segment_buckets": 68}
    told |= {"position_bias_max_distance": 99}
    others = {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32}
    others |= {"model_type": "cpmbee", "vocab_size": 3, "dim_head": 128, "dim_ff": 9}
    others |= {"mask_modules": [[False, False]] * 48}
    (folder / "config.json").write_text(json.dumps({**told, **others}))
    assert derived(folder) == replace(model.config, **told)
    # A split that does not add up to the rows of the table says nothing.
    told["position_bias_num_buckets"] = 256
    (folder / "config.json").write_text(json.dumps({**told, **others}))
    assert derived(folder).position_bias_num_buckets == 40
    assert derived(folder).position_bias_num_segment_buckets == 40


def test_part_of_a_config_beside(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", tiny.make_model(0), config=False)
    values = {"position_bias_num_buckets": 16, "position_bias_num_segment_buckets": 64}
    values |= {"eps": 1e-3, "position_bias_max_distance": 50}
    (folder / "config.json").write_text(json.dumps(values))
    assert derived(folder) == tiny.make_config(eps=1e-3)


def test_a_malformed_config_beside(folder: Path) -> None:
    values = {"position_bias_num_buckets": "16", "eps": 0, "half": 3}
    (folder / "config.json").write_text(json.dumps(values))
    lines = refusal(folder)
    assert [line.split('"')[1] for line in lines[1:]] == [
        "position_bias_num_buckets",
        "eps",
        "half",
    ]
    assert all(str(folder / "config.json") in line for line in lines[1:])
    (folder / "config.json").write_text("{")
    assert "config.json: not a JSON file" in refusal(folder)[0]


def test_layers_at_the_end_that_are_pruned_whole(tmp_path: Path) -> None:
    """They leave no tensor: "auto" finds a shorter model of the same results."""
    masks = ((False, False), (False, True), (True, True), (True, True))
    model = tiny.make_model(3, num_layers=4, mask_modules=masks)
    folder = write(tmp_path / "base", model)
    auto, given = load(folder), load(folder, folder / "config.json")
    assert auto.model.config.num_layers == 2
    assert auto.model.config.mask_modules == masks[:2]
    assert given.model.config == model.config
    assert same_results(auto.model, model) and same_results(given.model, model)
    assert auto.fingerprint == given.fingerprint


def test_every_disagreement_is_listed(tmp_path: Path) -> None:
    masks = ((False, False), (False, True), (True, False), (False, False))
    folder = write(tmp_path / "base", tiny.make_model(3, num_layers=4, mask_modules=masks))
    other = tiny.make_config(
        vocab_size=99,
        dim_model=14,
        num_heads=1,
        dim_head=4,
        dim_ff=15,
        num_layers=3,
        position_bias_num_buckets=32,
        mask_modules=((False, True), (False, False), (True, False)),
    )
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other.to_dict()))
    header, *lines, remedy = refusal(folder, path)
    assert header == f"{path} does not describe {folder / 'pytorch_model.bin'}:"
    assert lines == [
        f"vocab_size: 99 in the config, {len(tiny.TOKENIZER)} in the checkpoint",
        "dim_model: 14 in the config, 12 in the checkpoint",
        "num_heads: 1 in the config, 2 in the checkpoint",
        "dim_head: 4 in the config, 5 in the checkpoint",
        "dim_ff: 15 in the config, 14 in the checkpoint",
        "position buckets: 96 in the config, 80 in the checkpoint",
        "num_layers: 3 in the config, 4 in the checkpoint",
        "layer 0: attention only in the config, attention and FFN in the checkpoint",
        "layer 1: attention and FFN in the config, attention only in the checkpoint",
    ]
    assert remedy == "--model-config auto takes the sizes from the checkpoint"


def test_a_config_beside_that_contradicts_the_tensors_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = ((False, False), (False, True), (False, False), (True, True))
    model = tiny.make_model(3, num_layers=4, mask_modules=masks)
    folder = write(tmp_path / "base", model)
    path = folder / "config.json"
    assert same_results(load(folder).model, model)
    assert caplog.text == ""  # the last layer is pruned whole

    def warned(**values: Any) -> list[str]:
        path.write_text(json.dumps(values))
        assert same_results(load(folder).model, model)
        header, *lines = "\n".join(caplog.messages).splitlines() or [""]
        caplog.clear()
        expected = f"{path} does not describe {folder / 'pytorch_model.bin'}, whose "
        assert not header or header == expected + "tensors are used instead:"
        return [line.strip() for line in lines]

    buckets = {"position_bias_num_buckets": 16, "position_bias_num_segment_buckets": 64}
    buckets["position_bias_max_distance"] = model.config.position_bias_max_distance
    assert warned(**buckets) == warned(**buckets, hidden_size=12, eps=1e-6) == []
    assert warned(**buckets, hidden_size=4096, dim_ff=15) == [
        "dim_model: 4096 in the config, 12 in the checkpoint",
        "dim_ff: 15 in the config, 14 in the checkpoint",
    ]
    assert warned(**buckets, num_hidden_layers=5, mask_modules=[[0, 0], [0, 1]]) == [
        "the model config cannot be used:",
        f'{path}: "mask_modules" has 2 pairs for 5 layers',
    ]
    assert warned(**buckets, num_hidden_layers=3) == [
        "layer 1: attention and FFN in the config, attention only in the checkpoint"
    ]
    found = warned(**buckets, num_hidden_layers=1)
    assert found == ["num_layers: 1 in the config, 3 in the checkpoint"]


def test_a_given_config_decides_on_what_no_tensor_tells(folder: Path) -> None:
    path = folder / "other.json"
    changes: dict[str, Any] = {"position_bias_num_buckets": 12, "eps": 0.5, "half": True}
    changes |= {"position_bias_num_segment_buckets": 68, "position_bias_max_distance": 30}
    path.write_text(json.dumps(tiny.make_config(**changes).to_dict()))
    assert load(folder, path).model.config == tiny.make_config(**changes)


def drop_layers(state: dict) -> dict:
    return {n: t for n, t in state.items() if "layers" not in n}


def drop_embedding(state: dict) -> dict:
    return {n: t for n, t in state.items() if "embedding" not in n}


def flatten(state: dict) -> dict:
    return {n: t.flatten() for n, t in state.items()}


def scalars(state: dict) -> dict:
    return {n: t.sum() for n, t in state.items()}


@pytest.mark.parametrize("change", [drop_layers, drop_embedding, flatten, scalars])
def test_other_models(folder: Path, model: CPMBee, change: Callable) -> None:
    torch.save(change(model.state_dict()), folder / "pytorch_model.bin")
    assert "not a CPM-Bee model" in refusal(folder)[0]


# ------------------------------------------------------------------ what we saved ourselves


def test_the_note_beside_a_checkpoint_of_ours(tmp_path: Path, model: CPMBee) -> None:
    path = tmp_path / "run-best.pt"
    torch.save(model.state_dict(), path)
    vocabulary = tiny.write_vocabulary(tmp_path / "bee.txt")
    note = {"config": model.config.to_dict(), "vocab": str(vocabulary), "written_by": "cpm_bee"}
    path.with_suffix(".json").write_text(json.dumps(note))
    base = load(path)
    assert base.model.config == model.config and same_results(base.model, model)
    vocabulary.unlink()
    assert refusal(path)[0].startswith(f"no vocabulary: give --vocab FILE, or put it at {tmp_path}")


@pytest.mark.parametrize("note", [{}, {"config": 3}, {"config": "x", "vocab": 5}])
def test_a_foreign_json_beside_is_ignored(folder: Path, model: CPMBee, note: object) -> None:
    (folder / "pytorch_model.json").write_text(json.dumps(note))
    assert load(folder).model.config == model.config


@pytest.mark.parametrize("text", ["[1]", '"text"', '{"config": {', "[" * 100_000])
def test_a_broken_json_beside_is_named(folder: Path, text: str) -> None:
    (folder / "pytorch_model.json").write_text(text)
    lines = refusal(folder)
    assert lines[0].startswith(f"{folder / 'pytorch_model.json'}: ")
    assert "to load pytorch_model.bin without it" in lines[1]


# ------------------------------------------------------------------ vocabulary


def test_a_vocabulary_of_another_size(folder: Path, tmp_path: Path) -> None:
    size = len(tiny.TOKENIZER)
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*tiny.TOKENIZER.tokens, "x1", "x2"]))
    (line,) = refusal(folder, "auto", other)
    assert line.startswith(f"{other}: has {size + 2} tokens, the model has {size}; ")
    other.replace(folder / "vocab.txt")
    (line,) = refusal(folder)
    assert f"has {size + 2} tokens, the model has {size}" in line
    assert "--vocab FILE" in line and "fetch_vocab.sh" in line


def test_no_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (line,) = refusal(folder)
    assert f"put it at {folder / 'vocab.txt'}" in line and "fetch_vocab.sh" in line
    assert "no such vocabulary file" in refusal(folder, "auto", folder / "nothing.txt")[0]


# ------------------------------------------------------------------ random start, types, devices


def test_a_random_start(tmp_path: Path) -> None:
    config, vocabulary = tmp_path / "c.json", tiny.write_vocabulary(tmp_path / "v.txt")
    config.write_text(json.dumps(tiny.make_config().to_dict()))
    a, b, c = (load(None, config, vocabulary, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert same_results(a.model, b.model)
    half = load(None, config, vocabulary, dtype=torch.float16)
    assert half.fingerprint == a.fingerprint
    assert all(p.dtype == torch.float16 for p in half.model.parameters())
    for arguments in ((None, "auto", vocabulary), (None, config, None)):
        assert refusal(*arguments)[0].startswith("a random start (no --load) needs --model-config")
