"""Sections 6 and 7: checkpoints and deltas."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cpm_bee import delta
from cpm_bee.checkpoint.config_from_weights import derive_config, layers_present
from cpm_bee.checkpoint.reader import Checkpoint, save_tensors
from cpm_bee.checkpoint.sidecar import METADATA
from cpm_bee.delta import DeltaConfig
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee
from format_examples.common import TINY, Json, Rows, example, numbers


@example
def checkpoint_names(page: Json) -> Rows:
    entries = Checkpoint(TINY).entries
    shown = [n for n in entries if ".layers." not in n or ".layers.0." in n]
    return [
        [name, " x ".join(map(str, entries[name].shape)), str(entries[name].dtype)[6:]]
        for name in shown
    ]


@example
def derived_config(page: Json) -> Rows:
    values = derive_config(Checkpoint(TINY)).to_dict()
    names = ["vocab_size", "dim_model", "num_heads", "dim_head", "dim_ff", "num_layers"]
    return [[name, str(values[name])] for name in names]


@example
def hugging_face(page: Json) -> Rows:
    values = {
        "hidden_size": 1, "num_hidden_layers": 2, "num_attention_heads": 3, "dim_head": 4,
        "distance_scale": 16, "model_type": "cpmbee",
    }  # fmt: skip
    native = ModelConfig.native_names(values)
    by_value = {value: name for name, value in native.items()}
    rows = [[name, by_value.get(value, "(ignored)")] for name, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        weight = torch.zeros(2, 4)
        norm = "encoder.output_layernorm.weight"
        tensors = {f"cpmbee.{norm}": weight[0], "cpmbee.input_embedding.weight": weight}
        save_tensors(Path(folder) / "a.bin", {**tensors, "lm_head.weight": weight})
        entries = Checkpoint(Path(folder) / "a.bin").entries
    for name in (*tensors, "lm_head.weight"):
        kept = [native for native in entries if name == f"cpmbee.{native}"]
        rows.append([name, kept[0] if kept else "(ignored)"])
    return rows


@example
def pruned_layers(page: Json) -> Rows:
    names = page("pruned")
    present = layers_present(names)
    return [
        [str(i), *("yes" if p else "no" for p in pair), json.dumps([not p for p in pair])]
        for i, pair in enumerate(present)
    ]


@example
def lora_merge(page: Json) -> Rows:
    linear = Linear(4, 2)
    lora = delta.LoRA(linear, DeltaConfig(rank=1, alpha=2))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    merged = Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [1, -1, 1, -1]]))
        lora.lora_A.copy_(torch.tensor([[0.1, 0.0, 0.0, 0.1]]))
        lora.lora_B.copy_(torch.tensor([[1.0], [-2.0]]))
        base, path = linear(x), lora(x)
        linear.lora = lora
        ba = lora.lora_B @ lora.lora_A
        merged.weight.copy_(linear.weight + linear.dim_in**0.5 * lora.scale * ba)
        torch.testing.assert_close(merged(x), linear(x))
        values = [base, path, linear(x), *merged.weight]
    names = ["base path", "LoRA path", "sum", "merged W, row 0", "merged W, row 1"]
    return [[name, numbers(v.tolist())] for name, v in zip(names, values, strict=True)]


def _saved_delta() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = CPMBee(ModelConfig.load(TINY / "config.json"))
    delta.insert(model, DeltaConfig(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cpm_bee_finetune-delta-best.pt"
        delta.save(path, delta.tensors(model), DeltaConfig(), "0" * 64, "1" * 64)
        tensors = torch.load(path, weights_only=True)
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return tensors, sidecar


@example
def delta_names(page: Json) -> Rows:
    tensors, _ = _saved_delta()
    return [
        [name, " x ".join(map(str, value.shape)), str(value.dtype)[6:]]
        for name, value in tensors.items()
        if ".layers.0." in name
    ]


@example
def delta_metadata(page: Json) -> Rows:
    tensors, _ = _saved_delta()
    return _fields(json.loads(bytes(tensors[METADATA].tolist())))


@example
def delta_sidecar(page: Json) -> Rows:
    return _fields(_saved_delta()[1])


def _fields(values: dict[str, Any]) -> Rows:
    digits = "64 hex digits"
    fixed = {"base_fingerprint": digits, "vocabulary_fingerprint": digits}
    fixed["written_by"] = "name and version"
    return [[name, fixed.get(name, json.dumps(value))] for name, value in values.items()]
