"""Adapters that PEFT loads, and adapters of PEFT as deltas: logits and files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import pytest
import rounding
import torch
import torch.nn.functional as F
from folders import make_base, make_delta, read_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import run_script
from torch import nn

from cpm_bee import delta
from cpm_bee.checkpoint.convert import convert
from cpm_bee.checkpoint.options import ConvertOptions
from cpm_bee.checkpoint.reader import load_tensors
from cpm_bee.checkpoint.sidecar import METADATA
from cpm_bee.data.batch import Batch
from cpm_bee.delta import TARGETS, DeltaConfig, DeltaFile
from cpm_bee.errors import InputError
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee, target_loss


class TheirLinear(nn.Linear):
    """As Hugging Face's CPM-Bee has it: a `nn.Linear` whose output is divided by sqrt(dim_in)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) / self.in_features**0.5


class TheirModel(nn.Module):
    """A model with the module names of Hugging Face's `CpmBeeForCausalLM`."""

    def __init__(self, model: CPMBee) -> None:
        super().__init__()
        self.cpmbee = copy.deepcopy(model)
        for module in list(self.cpmbee.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    theirs = TheirLinear(child.dim_in, child.dim_out, bias=False)
                    theirs.weight = child.weight
                    setattr(module, name, theirs)
        for layer in self.cpmbee.encoder.layers:  # without our own backward pass
            layer.compiled_layer = layer.layer_output

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.cpmbee(batch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return make_base(tmp_path_factory.mktemp("peft") / "base")


@pytest.fixture
def batch() -> Batch:
    return folders.batch()


def run(source: Path, to: str, output: Path, **values: Any) -> Path:
    flags = ["--input", source, "--to", to, "--output", output]
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", value]
    convert(ConvertOptions.parse([str(flag) for flag in flags]))
    return output


def logits(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": model(batch)}


def assert_same_logits(ours: CPMBee, theirs: nn.Module, batch: Batch) -> None:
    """Equal in double precision, and equally exact in fp32 (see `rounding`)."""
    double = copy.deepcopy(theirs).double()

    def of_theirs(model: CPMBee) -> dict[str, torch.Tensor]:
        is_double = model.input_embedding.weight.dtype == torch.float64
        return logits(double if is_double else theirs, batch)

    rounding.assert_same(ours, of_theirs, lambda model: logits(model, batch))


@pytest.mark.parametrize(
    "config", [DeltaConfig(), DeltaConfig(rank=3, alpha=5.5, targets=TARGETS)], ids=["qv", "all"]
)
def test_peft_loads_a_delta(tmp_path: Path, base: Path, batch: Batch, config: DeltaConfig) -> None:
    file = make_delta(tmp_path / "d.pt", base, config)
    folder = run(file, "peft", tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    plain = folders.load(base).model.eval()
    theirs = PeftModel.from_pretrained(TheirModel(plain), str(folder)).eval()
    ours = folders.load(base).model.eval()
    delta.load(ours, file, *prints(base))
    assert_same_logits(ours, theirs, batch)
    difference = (logits(theirs, batch)["logits"] - logits(plain, batch)["logits"]).abs().max()
    assert difference > 0.1
    # What PEFT itself writes for this model has the same names, values and settings.
    theirs.save_pretrained(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    written = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    settings, full = (read_json(f / "adapter_config.json") for f in (folder, tmp_path / "saved"))
    settings["target_modules"], full["target_modules"] = (
        sorted(c["target_modules"]) for c in (settings, full)
    )
    assert settings.items() <= full.items()


def test_merging_of_peft_is_not_that_of_this_model(
    tmp_path: Path, base: Path, batch: Batch
) -> None:
    """As docs/checkpoints.md says: it lacks the factor sqrt(dim_in)."""
    folder = run(make_delta(tmp_path / "d.pt", base, DeltaConfig()), "peft", tmp_path / "adapter")
    plain = TheirModel(folders.load(base).model).eval()
    theirs = PeftModel.from_pretrained(plain, str(folder)).eval()
    expected = logits(theirs, batch)["logits"]
    merged = logits(theirs.merge_and_unload(), batch)["logits"]
    assert (merged - expected).abs().max() > 0.01


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_trained(
    tmp_path: Path, base: Path, batch: Batch, use_rslora: bool
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["project_q", "w_out"], use_rslora=use_rslora
    )
    theirs = get_peft_model(TheirModel(folders.load(base).model), config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(4):
        loss = target_loss(theirs(batch), batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    theirs.save_pretrained(str(tmp_path / "adapter"))
    file = run(tmp_path / "adapter", "delta", tmp_path / "d.pt", load=base)
    read = DeltaFile.read(file)
    assert (read.base_fingerprint, read.vocabulary_fingerprint) == prints(base)
    assert read.config.alpha == (20 if use_rslora else 10)
    ours = folders.load(base).model.eval()
    delta.load(ours, file, *prints(base))
    assert_same_logits(ours, theirs.eval(), batch)


def prints(base: Path) -> tuple[str, str]:
    found = folders.load(base)
    return found.fingerprint, found.tokenizer.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_bit_for_bit(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig(rank=2, alpha=3.5, targets=("w_0",)))
    stored = load_tensors(file, "a delta")
    delta_tensors = {n: t.to(dtype) for n, t in stored.items() if n != METADATA}
    torch.save({**delta_tensors, METADATA: stored[METADATA].clone()}, tmp_path / "typed.pt")
    adapter = run(tmp_path / "typed.pt", "peft", tmp_path / "adapter")
    back = DeltaFile.read(run(adapter, "delta", tmp_path / "back.pt"))
    original = DeltaFile.read(tmp_path / "typed.pt")
    assert back.config == original.config
    assert back.base_fingerprint == original.base_fingerprint == prints(base)[0]
    assert back.vocabulary_fingerprint == original.vocabulary_fingerprint
    assert back.tensors.keys() == original.tensors.keys() == delta_tensors.keys()
    for name, tensor in delta_tensors.items():
        assert back.tensors[name].dtype == dtype and torch.equal(back.tensors[name], tensor)
    again = run(tmp_path / "back.pt", "peft", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()


def test_an_old_adapter_of_the_model_without_its_head(tmp_path: Path, base: Path) -> None:
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    adapter = run(file, "peft", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(
        {name.replace("cpmbee.", ""): t for name, t in weights.items()},
        adapter / "adapter_model.bin",
    )
    (adapter / "adapter_model.safetensors").unlink()
    read = DeltaFile.read(run(adapter, "delta", tmp_path / "back.pt"))
    assert read.base_fingerprint is None and read.vocabulary_fingerprint is None
    expected = DeltaFile.read(file).tensors
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.items())


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    other = make_base(tmp_path / "other", num_layers=1)
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    adapter = run(file, "peft", tmp_path / "adapter", load=base)
    with pytest.raises(InputError, match="was trained on another base model"):
        run(file, "peft", tmp_path / "x", load=other)
    with pytest.raises(InputError, match="was trained on another base model"):
        run(adapter, "delta", tmp_path / "x.pt", load=other)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="is unexpected"):
        run(adapter, "delta", tmp_path / "x.pt", load=other)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias is trained"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"rank_pattern": {"project_q": 4}}, "rank_pattern is set"),
        ({"layers_to_transform": [0]}, "layers_to_transform is set"),
        ({"init_lora_weights": "pissa"}, "which changes the base's weights"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"peft_type": "IA3"}, "not the config of a LoRA adapter"),
        ({"r": 7}, "records rank 7, its tensors have rank 8"),
    ],
)
def test_what_a_delta_cannot_express_is_refused(
    tmp_path: Path, base: Path, changed: dict[str, Any], named: str
) -> None:
    adapter = run(make_delta(tmp_path / "d.pt", base, DeltaConfig()), "peft", tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    folders.write_json(config, read_json(config) | changed)
    with pytest.raises(InputError, match=named):
        run(adapter, "delta", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_all_strange_tensors_are_listed(tmp_path: Path, base: Path) -> None:
    adapter = run(make_delta(tmp_path / "d.pt", base, DeltaConfig()), "peft", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(name for name in weights if name.endswith("lora_B.weight"))
    del weights[first]
    embedding = "base_model.model.cpmbee.input_embedding.lora_embedding_A"
    save_file({**weights, embedding: torch.zeros(2, 2)}, path)
    with pytest.raises(InputError) as caught:
        run(adapter, "delta", tmp_path / "back.pt")
    header, *lines = str(caught.value).splitlines()
    assert header == f"{adapter}: this adapter cannot become a delta:"
    assert any(line.endswith("has no lora_B beside it") for line in lines)
    assert f"  {embedding}: is not the A or B of a Linear" in lines


def test_a_delta_file_is_not_replaced_by_accident(tmp_path: Path, base: Path) -> None:
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    adapter = run(file, "peft", tmp_path / "adapter")
    content = file.read_bytes()
    with pytest.raises(InputError, match="already exists; replace it with --overwrite"):
        run(adapter, "delta", file)
    with pytest.raises(InputError, match=r"would replace .*, which is read"):
        run(adapter, "delta", adapter / "adapter_config.json")
    with pytest.raises(InputError, match=r"would replace .*, which is read"):
        run(adapter, "delta", adapter / "adapter_config.pt")  # whose sidecar it would be
    with pytest.raises(InputError, match="is a folder"):
        run(adapter, "delta", tmp_path)
    assert file.read_bytes() == content


def test_the_printed_line_runs(tmp_path: Path, base: Path, batch: Batch) -> None:
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    folder = tmp_path / "my adapter"
    done = run_script(
        "src/convert_checkpoint.py", "--input", file, "--to", "peft", "--output", folder
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[1].partition("next, in Python: ")[2]
    values = {"PeftModel": PeftModel, "model": TheirModel(folders.load(base).model)}
    exec(line, values)
    assert isinstance(values["model"], PeftModel)
