"""The sizes of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cpm_bee.errors import InputError, Problems

# Hugging Face's name -> ours; both may stand in a config file.
_HUGGING_FACE = {
    "hidden_size": "dim_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a CPM-Bee config file (SPEC §5).

    `mask_modules` holds a pair (no attention, no FFN) a layer, or is empty for a whole model.
    `distance_scale` is the factor of a token's sub in its rotary turn.
    """

    vocab_size: int
    dim_model: int
    num_heads: int
    dim_head: int
    dim_ff: int
    num_layers: int
    dropout_p: float = 0.0
    position_bias_num_buckets: int = 256
    position_bias_num_segment_buckets: int = 256
    position_bias_max_distance: int = 2048
    eps: float = 1e-6
    half: bool = False
    mask_modules: tuple[tuple[bool, bool], ...] = ()
    distance_scale: float = 16

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a config file, native or Hugging Face's; fields of no interest are ignored."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such model config (see --model-config)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a JSON file: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: a model config is a JSON object")
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> ModelConfig:
        """Raises `InputError` with all that is missing or wrong."""
        problems = Problems()
        known = {}
        names = {f.name: f for f in fields(cls)}
        for key, value in values.items():
            name = _HUGGING_FACE.get(key, key)
            if name in names and value is not None:
                known[name] = value
        required = ("vocab_size", "dim_model", "num_heads", "dim_head", "dim_ff", "num_layers")
        for name in required:
            if name not in known:
                problems.add(source, f'"{name}" is missing')
        for name, value in known.items():
            reason = _check(name, value)
            if reason:
                problems.add(source, f'"{name}" {reason}, this is {value!r}')
        problems.raise_if_any("the model config cannot be used:")
        masks = known.pop("mask_modules", ())
        config = cls(**known, mask_modules=tuple((bool(a), bool(b)) for a, b in masks))
        if config.mask_modules and len(config.mask_modules) != config.num_layers:
            problems.add(
                source,
                f'"mask_modules" has {len(config.mask_modules)} pairs for '
                f"{config.num_layers} layers",
            )
        if config.dim_model % 2:
            problems.add(source, f'"dim_model" is odd: {config.dim_model}')
        problems.raise_if_any("the model config cannot be used:")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields for a native config file."""
        values = asdict(self)
        if not self.mask_modules:
            del values["mask_modules"]
        if self.distance_scale == 16:
            del values["distance_scale"]
        return values

    def has_attention(self, layer: int) -> bool:
        return not self.mask_modules or not self.mask_modules[layer][0]

    def has_ffn(self, layer: int) -> bool:
        return not self.mask_modules or not self.mask_modules[layer][1]


def _check(name: str, value: Any) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "half":
        return None if isinstance(value, bool) else "must be true or false"
    if name == "dropout_p":
        return None if is_number and 0 <= value < 1 else "must be a number from 0 to below 1"
    if name in ("eps", "distance_scale"):
        return None if is_number and value > 0 else "must be a number above 0"
    if name == "mask_modules":
        pairs = isinstance(value, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value
        )
        return None if pairs else "must be a list of pairs"
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if whole else "must be a whole number above 0"
