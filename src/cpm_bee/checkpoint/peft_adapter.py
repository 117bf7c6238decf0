"""Reads and writes LoRA adapter folders of Hugging Face's PEFT; does not need PEFT.

PEFT wraps Hugging Face's CPM-Bee, whose Linears divide by sqrt(dim_in) as ours do, and adds its
low-rank path to their output. So both compute the same, with the same A, B and alpha, and only the
names differ. PEFT's own merging is another matter: it adds alpha/r B A to W, without the factor
sqrt(dim_in) that this model needs (docs/format.md §7).

The fingerprints of base and vocabulary are in the metadata of the safetensors file, which PEFT
neither reads nor keeps.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from cpm_bee.checkpoint.reader import PREFIX, Checkpoint
from cpm_bee.checkpoint.writer import StoredTensor, write_safetensors
from cpm_bee.delta import INFIX, DeltaFile
from cpm_bee.disk import open_to_write
from cpm_bee.errors import InputError, Problems, shown

CONFIG = "adapter_config.json"
_WEIGHTS, _OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_WRAPPED = "base_model.model."  # what PEFT puts before the names of the wrapped model
_NAME = re.compile(
    rf"{re.escape(_WRAPPED)}(?:{re.escape(PREFIX)})?(?P<linear>.+)\.lora_(?P<factor>[AB])\.weight"
)
_METADATA = "cpm_bee"
_FINGERPRINTS = ("base_fingerprint", "vocabulary_fingerprint")
# Settings with which an adapter is more, or something else, than A and B at whole Linears.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Initial values that leave the base as it is; others (PiSSA, OLoRA, ...) change its weights.
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def write_adapter(folder: Path, delta: DeltaFile, base: str | None) -> None:
    """Write a delta as an adapter into an existing folder.

    Args:
        base: what `base_model_name_or_path` of the adapter says; None if it is not known.
    """
    values = {_their_name(name): tensor for name, tensor in delta.tensors.items()}
    stored = [StoredTensor(name, tuple(t.shape), t.dtype) for name, t in values.items()]
    prints = {name: getattr(delta, name) for name in _FINGERPRINTS}
    known = {name: value for name, value in prints.items() if value is not None}
    metadata = {"format": "pt", _METADATA: json.dumps(known)}
    with open_to_write(folder / _WEIGHTS, "wb") as file:
        write_safetensors(file, stored, values.items(), metadata)
    alpha = delta.config.alpha
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": delta.config.rank,
        "target_modules": list(delta.config.targets),
        "task_type": None,
    }
    with open_to_write(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def _their_name(name: str) -> str:
    linear, _, factor = name.partition(INFIX)
    return f"{_WRAPPED}{PREFIX}{linear}.{factor}.weight"


def read_adapter(folder: Path) -> DeltaFile:
    """Read an adapter folder that this module or PEFT wrote.

    Raises:
        InputError: it is not such a folder, or a delta cannot express the adapter; all reasons
            are listed.
    """
    config = _read_config(folder / CONFIG)
    path = next((folder / n for n in (_WEIGHTS, _OLD_WEIGHTS) if (folder / n).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: an adapter without its weights ({_WEIGHTS})")
    problems = Problems()
    problems.extend(CONFIG, _config_problems(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in Checkpoint(path).entries.items():
        if match := _NAME.fullmatch(name):
            tensors[f"{match['linear']}{INFIX}lora_{match['factor']}"] = entry.read().clone()
        else:
            problems.add(name, "is not the A or B of a Linear")
    for name in tensors:
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in tensors:
            problems.add(name, f"has no {other[-6:]} beside it")
    problems.raise_if_any(f"{folder}: this adapter cannot become a delta:")
    recorded = {"rank": config["r"], "alpha": _alpha(config), **_read_fingerprints(path)}
    return DeltaFile.of(folder, tensors, recorded)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent}: not a PEFT adapter folder: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the config of a LoRA adapter")
    return config


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = [f"{n} is set, which a delta does not have" for n in _UNSUPPORTED if config.get(n)]
    if config.get("bias", "none") != "none":
        problems.append("bias is trained, which this model does not have")
    initial = config.get("init_lora_weights")
    if not any(initial is value or initial == value for value in _INITIALIZATIONS):
        problems.append(f"init_lora_weights is {shown(initial)}, which changes the base's weights")
    if type(config.get("r")) is not int or config["r"] < 1:
        problems.append(f"r is {shown(config.get('r'))}, expected a whole number from 1")
    if not 0 < _alpha(config) < math.inf:
        problems.append(
            f"lora_alpha is {shown(config.get('lora_alpha'))}, expected a number above 0"
        )
    return problems


def _alpha(config: dict[str, Any]) -> float:
    """The alpha with which alpha/r is the adapter's scale; NaN if there is none."""
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return math.nan
    try:
        # With `use_rslora`, an adapter is scaled by alpha / sqrt(r).
        return float(alpha) * (math.sqrt(rank or 1) if config.get("use_rslora") else 1)
    except (OverflowError, TypeError, ValueError):
        return math.nan


def _read_fingerprints(path: Path) -> dict[str, str]:
    """The fingerprints that `write_adapter` recorded; empty for other adapters."""
    from safetensors import safe_open

    if path.name != _WEIGHTS:
        return {}
    text = (safe_open(path, framework="pt").metadata() or {}).get(_METADATA, "{}")
    try:
        known = json.loads(text)
        return {name: str(known[name]) for name in _FINGERPRINTS if name in known}
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: its metadata {_METADATA!r} is damaged") from None
