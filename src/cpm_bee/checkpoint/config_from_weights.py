"""Derives the config from a checkpoint's tensors, and compares it with a given one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.sidecar import sidecar_path
from cpm_bee.errors import InputError, Problems
from cpm_bee.model.config import ModelConfig

logger = logging.getLogger(__name__)

_BUCKETS = ("buckets", "segment_buckets")
# Three digits: the number of layers that a file claims must not fill the memory.
_LAYER = re.compile(r"encoder\.layers\.(\d{1,3})\.(self_att|ffn)\.")


def derive_config(checkpoint: Checkpoint, sidecar: dict[str, Any] | None = None) -> ModelConfig:
    """Derives the config of a checkpoint from its tensors and the config beside it.

    The tensors determine sizes and pruned blocks (docs/format.md §6). The split of the buckets,
    max_distance, eps, dropout, distance_scale and half come from the sidecar or `config.json`,
    or else have their defaults; the default of half is whether all tensors are fp16.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    blocks = layers_present(shapes)
    embedding = shapes.get("input_embedding.weight", ())
    bias = shapes.get("position_bias.relative_attention_bias", ())
    query = _first_shape(shapes, "project_q.weight")
    if len(embedding) != 2 or len(bias) != 2 or not blocks or bias[1] == 0:
        raise InputError(
            f"{checkpoint.path}: not a CPM-Bee model: it lacks input_embedding.weight, "
            "position_bias.relative_attention_bias or the encoder's layers"
        )
    source, noted = _sidecar_config(checkpoint.path, sidecar)
    values = ModelConfig.native_names(noted)
    gate = _first_shape(shapes, "w_in.w_0.weight")
    values |= {
        "vocab_size": embedding[0],
        "dim_model": embedding[1],
        "num_heads": bias[1],
        "dim_head": query[0] // bias[1] if query else values.get("dim_head", 1),
        "dim_ff": gate[0] if gate else values.get("dim_ff", 1),
        "num_layers": len(blocks),
    }
    split = [values.setdefault(f"position_bias_num_{kind}", 256) for kind in _BUCKETS]
    # Values that are not numbers are refused below, by name.
    if all(isinstance(size, int) for size in split) and sum(split) != bias[0]:
        values |= {
            "position_bias_num_buckets": bias[0] // 2,
            "position_bias_num_segment_buckets": bias[0] - bias[0] // 2,
        }
    whole = all(attention and ffn for attention, ffn in blocks)
    values["mask_modules"] = () if whole else tuple((not a, not f) for a, f in blocks)
    dtypes = {entry.dtype for entry in checkpoint.entries.values()}
    values.setdefault("half", dtypes == {torch.float16})
    return ModelConfig.from_dict(values, source)


def _sidecar_config(path: Path, sidecar: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The source and the fields of the config beside a checkpoint; fields may be missing."""
    noted = (sidecar or {}).get("config")
    if isinstance(noted, dict):
        return str(sidecar_path(path)), noted
    beside = path.parent / "config.json"
    if beside.is_file():
        return str(beside), ModelConfig.read(beside)
    return str(path), {}


def _first_shape(shapes: dict[str, tuple[int, ...]], ending: str) -> tuple[int, ...]:
    return next((s for n, s in shapes.items() if n.endswith(ending) and len(s) == 2), ())


def warn_of_contradictions(
    checkpoint: Checkpoint, sidecar: dict[str, Any] | None, derived: ModelConfig
) -> None:
    """Log a warning if the config beside a checkpoint contradicts its tensors."""
    source, noted = _sidecar_config(checkpoint.path, sidecar)
    known = ModelConfig.native_names(noted)
    whole = {"mask_modules": ()} if "num_layers" in known else {}
    try:
        beside = ModelConfig.from_dict({**derived.to_dict(), **whole, **known}, source)
        text = _differences(beside, derived).text()
    except InputError as error:
        text = str(error)
    if text:
        logger.warning(
            f"{source} does not describe {checkpoint.path}, whose tensors are used instead:\n{text}"
        )


def check_agreement(given: ModelConfig, derived: ModelConfig, source: str, path: Path) -> None:
    """Raise `InputError` if a given config differs from a checkpoint's; all differences listed."""
    _differences(given, derived).raise_if_any(
        f"{source} does not describe {path}:",
        "--model-config auto takes the sizes from the checkpoint",
    )


def _differences(given: ModelConfig, derived: ModelConfig) -> Problems:
    sizes = ["vocab_size", "dim_model", "num_heads", "dim_head", "dim_ff"]
    problems = Problems()
    for name in sizes:
        if getattr(given, name) != getattr(derived, name):
            problems.add(
                name,
                f"{getattr(given, name)} in the config, {getattr(derived, name)} in the checkpoint",
            )
    rows = given.position_bias_num_buckets + given.position_bias_num_segment_buckets
    found = derived.position_bias_num_buckets + derived.position_bias_num_segment_buckets
    if rows != found:
        problems.add("position buckets", f"{rows} in the config, {found} in the checkpoint")
    expected, actual = _blocks(given), _blocks(derived)
    if len(expected) != len(actual):
        problems.add(
            "num_layers", f"{len(expected)} in the config, {len(actual)} in the checkpoint"
        )
    for i, (wanted, present) in enumerate(zip(expected, actual, strict=False)):
        if wanted != present:
            problems.add(f"layer {i}", f"{wanted} in the config, {present} in the checkpoint")
    return problems


def _blocks(config: ModelConfig) -> list[str]:
    names = {
        (True, True): "attention and FFN",
        (True, False): "attention only",
        (False, True): "FFN only",
        (False, False): "neither",
    }
    blocks = [names[config.has_attention(i), config.has_ffn(i)] for i in range(config.num_layers)]
    # Completely pruned layers at the end leave no trace in a checkpoint.
    while blocks and blocks[-1] == "neither":
        blocks.pop()
    return blocks


def layers_present(names: Iterable[str]) -> list[tuple[bool, bool]]:
    """Whether any weight of the attention and of the FFN is there, for each layer."""
    present: dict[int, list[bool]] = {}
    for name in names:
        if match := _LAYER.match(name):
            blocks = present.setdefault(int(match[1]), [False, False])
            blocks[match[2] == "ffn"] = True
    count = max(present, default=-1) + 1
    return [tuple(present.get(i, [False, False])) for i in range(count)]  # type: ignore[misc]
