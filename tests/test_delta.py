from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import rounding
import tiny
import torch

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.delta import TARGETS, DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee, target_loss

BASE, VOCABULARY = "0" * 64, "1" * 64
OWNERS = {
    "project_q": "self_att.self_attention.project_q",
    "project_k": "self_att.self_attention.project_k",
    "project_v": "self_att.self_attention.project_v",
    "attention_out": "self_att.self_attention.attention_out",
    "w_0": "ffn.ffn.w_in.w_0",
    "w_1": "ffn.ffn.w_in.w_1",
    "w_out": "ffn.ffn.w_out",
}


@pytest.fixture
def batch() -> Batch:
    return collate(tiny.encode([{"input": "春 é" * 5, "<ans>": "é 天"}]), tiny.TOKENIZER)


def tuned(config: DeltaConfig | None = None, seed: int = 0, **changes: Any) -> CPMBee:
    """A model with a delta whose B is not zero."""
    model = tiny.make_model(1, **changes)
    delta.insert(model, config or DeltaConfig(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(path: Path, model: CPMBee, config: DeltaConfig | None = None) -> Path:
    delta.save(path, delta.tensors(model), config or DeltaConfig(), BASE, VOCABULARY)
    return path


def logits(model: CPMBee, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


# ------------------------------------------------------------------ inserting


@pytest.mark.parametrize("targets", [("project_q", "project_v"), TARGETS, ("w_out",)])
def test_names_and_what_is_trained(targets: tuple[str, ...]) -> None:
    model = tiny.make_model()
    frozen = set(model.state_dict())
    delta.insert(model, DeltaConfig(rank=3, targets=targets), seed=0)
    expected = {
        f"encoder.layers.{i}.{OWNERS[target]}.lora.lora_{ab}"
        for i in range(2)
        for target in targets
        for ab in "AB"
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    found = delta.tensors(model)
    assert set(found) == expected
    for name, tensor in found.items():
        owner = model.get_submodule(name.split(".lora.")[0])
        assert isinstance(owner, Linear)
        dim_out, dim_in = owner.weight.shape
        assert tensor.shape == ((3, dim_in) if name.endswith("A") else (dim_out, 3))
        assert tensor.dtype == torch.float32


def test_a_new_delta_changes_nothing_and_depends_on_the_seed(batch: Batch) -> None:
    plain = logits(tiny.make_model(1), batch)
    models = [tiny.make_model(1) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(len(model.state_dict()) + seed)  # must not matter
        delta.insert(model, DeltaConfig(), seed)
        assert torch.equal(logits(model, batch), plain)
    a, b, c = map(delta.tensors, models)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {n for n in a if not torch.equal(a[n], c[n])} == {n for n in a if n.endswith("A")}


def test_initial_values() -> None:
    model = tiny.make_model(dim_model=64)
    delta.insert(model, DeltaConfig(rank=32), seed=0)
    for name, tensor in delta.tensors(model).items():
        if name.endswith("B"):
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt(5)
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_low_rank_path_is_not_divided(batch: Batch) -> None:
    """docs/format.md §7: merging into W needs W + sqrt(dim_in) * (alpha/r) * B A."""
    config = DeltaConfig(rank=4, alpha=10, targets=TARGETS)
    model = tuned(config)

    @torch.no_grad()
    def merged(model: CPMBee) -> dict[str, torch.Tensor]:
        for module in model.modules():
            if isinstance(module, Linear):
                lora: Any = module.lora
                update = lora.lora_B @ lora.lora_A * (10 / 4)
                module.weight += math.sqrt(module.weight.shape[1]) * update
                lora.lora_B.zero_()
        return {"logits": model(batch)}

    rounding.assert_same(model, lambda m: {"logits": logits(m, batch)}, merged)
    expected = merged(copy.deepcopy(model))["logits"]
    assert (logits(tiny.make_model(1), batch) - expected).abs().max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_acts_and_learns(batch: Batch, target: str) -> None:
    model = tuned(DeltaConfig(targets=(target,)))
    difference = (logits(model, batch) - logits(tiny.make_model(1), batch)).abs().max()
    assert difference > 1e-2
    target_loss(model(batch), batch).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_a_pruned_model_has_a_delta_where_it_has_attention() -> None:
    model = tuned(num_layers=3, mask_modules=((True, False), (False, True), (True, True)))
    assert {name.split(".")[2] for name in delta.tensors(model)} == {"1"}


def test_dropout_acts_in_training_alone(batch: Batch) -> None:
    model, plain = tuned(DeltaConfig(dropout=0.5)), tuned()
    assert torch.equal(logits(model, batch), logits(plain, batch))
    model.train()
    assert not torch.allclose(logits(model, batch), logits(model, batch), atol=1e-3)
    plain.train()
    assert torch.equal(logits(plain, batch), logits(plain, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_base_in_16_bits(batch: Batch, dtype: torch.dtype) -> None:
    """The delta stays in fp32, whatever the base; with and without autocast."""
    model = tiny.make_model(1).to(dtype)
    delta.insert(model, DeltaConfig(), seed=0)
    trained = delta.tensors(model)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert logits(model, batch).dtype == dtype
    with torch.autocast("cpu", dtype):
        target_loss(model(batch), batch).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize(
    ("targets", "named"), [(("project_q", "query", "wo"), "query, wo"), ((), "nothing")]
)
def test_targets_are_validated(targets: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=f"--delta-targets: {named} is not a layer") as caught:
        DeltaConfig(targets=targets)
    assert all(target in str(caught.value) for target in TARGETS)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "config",
    [
        DeltaConfig(),
        DeltaConfig(rank=3, alpha=5.5, targets=("w_0",)),
        DeltaConfig(targets=tuple(sorted(TARGETS))),
    ],
)
@pytest.mark.parametrize("kept", ["both", "metadata", "sidecar", "neither"])
def test_a_saved_delta_loads(
    tmp_path: Path, batch: Batch, config: DeltaConfig, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With its sidecar, alone, as an older version wrote it, and as another tool does."""
    model = tuned(config)
    path = saved(tmp_path / "d.pt", model, config)
    if kept in ("metadata", "neither"):
        path.with_suffix(".json").unlink()
    if kept in ("sidecar", "neither"):
        torch.save(delta.tensors(model), path)
    other = tiny.make_model(1)
    loaded = delta.load(other, path, BASE, VOCABULARY)
    assert loaded.rank == config.rank and set(loaded.targets) == set(config.targets)
    assert loaded.alpha == (16 if kept == "neither" else config.alpha)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if kept == "neither":
        (line,) = told
        assert str(path) in line and "alpha 16 is assumed" in line and "--delta-alpha" in line
        other = tiny.make_model(1)
        delta.load(other, path, BASE, VOCABULARY, alpha=config.alpha)
        assert len(caplog.records) == 1
    else:
        assert not told
    assert torch.equal(logits(other, batch), logits(model, batch))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(delta.tensors(model))


def test_what_is_saved(tmp_path: Path) -> None:
    path = saved(tmp_path / "run-delta-best.pt", tuned())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-delta-best.json", path.name]
    stored = torch.load(path, weights_only=True)
    assert type(stored) is dict and all(type(t) is torch.Tensor for t in stored.values())
    metadata = stored.pop("cpm_bee.metadata")
    assert metadata.dtype == torch.uint8 and metadata.dim() == 1
    assert set(stored) == set(delta.tensors(tuned()))
    note = json.loads(path.with_suffix(".json").read_text())
    for values in (note, json.loads(bytes(metadata.tolist()))):
        assert values.pop("written_by").startswith("cpm_bee ")
        if values is not note:
            assert values.pop("vocabulary_fingerprint") == VOCABULARY
        assert values == {
            "rank": 8,
            "alpha": 16,
            "targets": ["project_q", "project_v"],
            "base_fingerprint": BASE,
        }


def test_a_saved_delta_loads_in_other_tools(tmp_path: Path) -> None:
    """As they do it: a module with such parameters, `strict=False`, perhaps in half precision."""
    model = tuned()
    path = saved(tmp_path / "d.pt", model)
    other = tiny.make_model(1)
    delta.insert(other, DeltaConfig(), seed=3)
    stored = {name: value.half() for name, value in torch.load(path, weights_only=True).items()}
    found = other.half().load_state_dict(stored, strict=False)
    assert found.unexpected_keys == ["cpm_bee.metadata"]
    assert not any(".lora." in name for name in found.missing_keys)
    for name, value in delta.tensors(model).items():
        assert torch.equal(other.state_dict()[name], value.half())


def rewritten(path: Path, **changes: Any) -> Path:
    """A saved delta with other values in its metadata."""
    stored = torch.load(path, weights_only=True)
    values = json.loads(bytes(stored["cpm_bee.metadata"].tolist())) | changes
    text = bytearray(json.dumps(values).encode())
    torch.save({**stored, "cpm_bee.metadata": torch.frombuffer(text, dtype=torch.uint8)}, path)
    return path


@pytest.mark.parametrize(
    "changed",
    [{"alpha": 64}, {"rank": 4}, {"targets": ["w_0"]}, {"base_fingerprint": "e" * 64}],
)
def test_a_sidecar_that_says_something_else_is_refused(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    path = saved(tmp_path / "d.pt", tuned())
    note = path.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | changed))
    header, line, remedy = refusal(path)
    assert header.startswith(f"{note}: does not describe {path}")
    assert line.startswith(f"{next(iter(changed))}: ") and ", in the delta " in line
    assert f"mv {note} {note}.unused" in remedy
    note.rename(f"{note}.unused")
    delta.load(tiny.make_model(1), path, BASE, VOCABULARY)


def test_the_rank_is_that_of_the_tensors(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "d.pt", tuned()), rank=4)
    path.with_suffix(".json").unlink()
    assert refusal(path)[0].startswith(f"{path}: records rank 4, its tensors have rank 8")


def test_an_alpha_that_is_recorded_is_not_overridden(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.pt", tuned())
    delta.load(tiny.make_model(1), path, BASE, VOCABULARY, alpha=16)
    with pytest.raises(InputError, match=r"--delta-alpha 64: .*d\.pt was trained with alpha 16"):
        delta.load(tiny.make_model(1), path, BASE, VOCABULARY, alpha=64)


@pytest.mark.parametrize(
    "metadata",
    [
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor([123], dtype=torch.uint8),
        torch.full((200_000,), 91, dtype=torch.uint8),
        torch.full((60_000,), 91, dtype=torch.uint8),
        torch.tensor([255, 254], dtype=torch.uint8),
        3,
    ],
)
def test_metadata_that_is_damaged_is_refused(tmp_path: Path, metadata: Any) -> None:
    path = saved(tmp_path / "d.pt", tuned())
    torch.save({**torch.load(path, weights_only=True), "cpm_bee.metadata": metadata}, path)
    assert refusal(path)[0].startswith(f"{path}: its cpm_bee.metadata is damaged")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.pt", tuned())
    with pytest.raises(InputError, match=r"another vocabulary .*111111111111.*--vocab"):
        delta.load(tiny.make_model(1), path, BASE, "2" * 64)


def test_a_delta_in_fp16(tmp_path: Path) -> None:
    model = tuned()
    halves = {name: tensor.half() for name, tensor in delta.tensors(model).items()}
    torch.save(halves, tmp_path / "d.pt")
    other = tiny.make_model(1)
    delta.load(other, tmp_path / "d.pt", BASE, VOCABULARY)
    for name, tensor in delta.tensors(other).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, halves[name].float())


def refusal(path: Path, model: CPMBee | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        delta.load(model or tiny.make_model(1), path, BASE, VOCABULARY)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.pt"
    delta.save(path, delta.tensors(tuned()), DeltaConfig(), "f" * 64, VOCABULARY)
    model = tiny.make_model(1)
    (line,) = refusal(path, model)
    assert line.startswith(f"{path}: was trained on another base model (fingerprint ffffffffffff")
    assert "000000000000" in line and "--load" in line
    assert all(p.requires_grad for p in model.parameters())  # nothing was inserted


def test_problems_are_all_listed(tmp_path: Path) -> None:
    tensors = delta.tensors(tuned())
    q, v = (f"encoder.layers.0.{OWNERS[f'project_{x}']}.lora.lora_" for x in "qv")
    del tensors[f"{q}B"], tensors[f"{v}A"]
    tensors[f"{v}B"] = torch.zeros(9, 8)
    tensors["encoder.layers.7.self_att.self_attention.project_q.lora.lora_A"] = torch.zeros(8, 12)
    tensors["encoder.layers.0.other.lora.lora_A"] = torch.zeros(8, 12)
    tensors["input_embedding.weight"] = tiny.make_model().input_embedding.weight.detach()
    torch.save(tensors, tmp_path / "d.pt")
    header, *lines = refusal(tmp_path / "d.pt")
    assert header == f"{tmp_path / 'd.pt'}: does not fit the model:"
    assert lines == [
        "encoder.layers.0.other.lora.lora_A: is unexpected",
        f"{q}B: is missing",
        f"{v}A: is missing",
        f"{v}B: has shape [9, 8], expected [10, 8]",
        "encoder.layers.7.self_att.self_attention.project_q.lora.lora_A: is unexpected",
        "input_embedding.weight: is unexpected",
    ]


Q = f"encoder.layers.0.{OWNERS['project_q']}.lora.lora_A"
NO_DELTA: dict[str, Any] = {
    "a checkpoint": {"input_embedding.weight": torch.zeros(2, 2)},
    "vectors": {Q: torch.zeros(8)},
    "whole numbers": {Q: torch.zeros(8, 12, dtype=torch.int64)},
    "numbers for names": {Q: torch.zeros(8, 12), 3: torch.zeros(2, 2)},
    "values": {Q: torch.zeros(8, 12), "step": 3},
    "nothing": {},
    "a list": [torch.zeros(8, 12)],
    "other layers": {"encoder.query.lora.lora_A": torch.zeros(8, 12)},
}


@pytest.mark.parametrize("content", NO_DELTA.values(), ids=list(NO_DELTA))
def test_files_that_are_no_delta(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "d.pt")
    assert f"{tmp_path / 'd.pt'}: not a delta file" in refusal(tmp_path / "d.pt")[0]


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "d.pt"
    assert refusal(path) == [f"{path}: no such delta file"]
    path.write_text("hello")
    assert "not a delta file, but a file that begins with b'hello'" in refusal(path)[0]
    saved(path, tuned())
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a delta file, or a damaged one" in refusal(path)[0]


def test_several_ranks(tmp_path: Path) -> None:
    tensors = delta.tensors(tuned())
    tensors[Q] = torch.zeros(4, 12)
    torch.save(tensors, tmp_path / "d.pt")
    assert "LoRA of several ranks [4, 8], expected one" in refusal(tmp_path / "d.pt")[0]


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ("{", "not a JSON file"),
        ("[1]", "a JSON object is expected"),
        ('{"alpha": "16"}', "alpha '16' is not a number above 0"),
        ('{"alpha": 0}', "alpha 0 is not"),
        ('{"alpha": true}', "alpha True is not"),
        ('{"alpha": NaN}', "not a JSON file: NaN is not a finite number"),
    ],
)
def test_malformed_notes(tmp_path: Path, note: str, reason: str) -> None:
    path = saved(tmp_path / "d.pt", tuned())
    path.with_suffix(".json").write_text(note)
    line, *_ = refusal(path)
    assert line.startswith(f"{path.with_suffix('.json')}: {reason}")


def test_a_second_delta_replaces_the_first(tmp_path: Path, batch: Batch) -> None:
    """Of other rank and targets too: nothing of the first may stay."""
    first = saved(tmp_path / "a.pt", tuned(seed=1))
    config = DeltaConfig(rank=2, targets=("w_0",))
    second = saved(tmp_path / "b.pt", tuned(config, seed=2), config)
    model, fresh = tiny.make_model(1), tiny.make_model(1)
    delta.load(model, first, BASE, VOCABULARY)
    delta.load(model, second, BASE, VOCABULARY)
    delta.load(fresh, second, BASE, VOCABULARY)
    assert torch.equal(logits(model, batch), logits(fresh, batch))
    assert set(delta.tensors(model)) == set(delta.tensors(fresh))
