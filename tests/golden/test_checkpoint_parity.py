"""Files of other CPM-Bee tools are read, and ours have their names, shapes and types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cpm_bee import delta
from cpm_bee.checkpoint.reader import save_tensors
from cpm_bee.model.config import ModelConfig
from cpm_bee.pretrained import PretrainedModel, load_pretrained

CPU = torch.device("cpu")
DELTA = "cpm_bee_finetune-delta-best.pt"


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture
def pretrained(shared: Path) -> PretrainedModel:
    folder = shared / "golden"
    config, vocabulary = folder / "pytorch_model_config.json", shared / "vocab" / "bee.txt"
    return load_pretrained(
        str(folder / "pytorch_model.bin"), str(config), str(vocabulary), torch.float32, CPU
    )


@pytest.mark.parametrize("stem", ["pytorch_model", "trained"])
def test_checkpoints_load(shared: Path, stem: str) -> None:
    """By their own config and by "auto": the same model, the values those of the file."""
    path, vocabulary = shared / "golden" / f"{stem}.bin", str(shared / "vocab" / "bee.txt")
    config = str(shared / "golden" / f"{stem}_config.json")
    given = load_pretrained(str(path), config, vocabulary, torch.float32, CPU)
    auto = load_pretrained(str(path), "auto", vocabulary, torch.float32, CPU)
    assert given.fingerprint == auto.fingerprint
    expected = ModelConfig.load(config).to_dict()
    expected.pop("half")  # no tensor tells it
    found = auto.model.config.to_dict()
    found.pop("half")
    assert found == expected
    stored = read(path)
    for loaded in (given, auto):
        state = loaded.model.state_dict()
        assert set(state) == set(stored)
        assert all(torch.equal(state[n], stored[n].float()) for n in stored)
        assert all(t.dtype == torch.float32 for t in state.values())


def test_a_checkpoint_saved_by_us_has_their_form(
    pretrained: PretrainedModel, shared: Path, tmp_path: Path
) -> None:
    theirs = read(shared / "golden" / "pytorch_model.bin")
    ours = {name: tensor.half() for name, tensor in pretrained.model.state_dict().items()}
    save_tensors(tmp_path / "pytorch_model.bin", ours)
    again = read(tmp_path / "pytorch_model.bin")
    assert type(again) is dict
    assert set(again) == set(theirs)
    for name, tensor in theirs.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_their_delta_loads(pretrained: PretrainedModel, shared: Path) -> None:
    path = shared / "golden" / DELTA
    config = delta.load(
        pretrained.model, path, pretrained.fingerprint, pretrained.tokenizer.fingerprint
    )
    assert config == delta.DeltaConfig(rank=8, alpha=16, targets=("project_q", "project_v"))
    stored = read(path)
    loaded = delta.tensors(pretrained.model)
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_our_delta_has_their_form(
    pretrained: PretrainedModel, shared: Path, tmp_path: Path
) -> None:
    config = delta.DeltaConfig()
    delta.insert(pretrained.model, config, seed=0)
    prints = (pretrained.fingerprint, pretrained.tokenizer.fingerprint)
    delta.save(tmp_path / DELTA, delta.tensors(pretrained.model), config, *prints)
    ours, theirs = read(tmp_path / DELTA), read(shared / "golden" / DELTA)
    assert type(ours) is dict
    assert ours.pop("cpm_bee.metadata").dtype == torch.uint8
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    note = json.loads((tmp_path / DELTA).with_suffix(".json").read_text())
    assert note["base_fingerprint"] == pretrained.fingerprint
