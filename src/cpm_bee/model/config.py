"""The config of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.paths import not_a_file

# Hugging Face's name -> ours; a config file may use either.
_HUGGING_FACE = {
    "hidden_size": "dim_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_REQUIRED = ("vocab_size", "dim_model", "num_heads", "dim_head", "dim_ff", "num_layers")
# A quarter of the buckets is for exact distances, and docs/format.md §5 divides by their number.
_LEAST = {"position_bias_num_buckets": 4}
# Far beyond any existing model. Building a model takes time in proportion to its layers; the
# product of three sizes stays below 2**63.
_MOST = {"num_layers": 512}
_MOST_OF_A_SIZE = 2**20
_LARGEST_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a CPM-Bee config file (docs/format.md §5).

    `mask_modules` has a pair (no attention, no FFN) for each layer, or is empty if nothing is
    pruned. `distance_scale` is the factor of a token's sub in its rotary embedding.
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
        """Read a native or Hugging Face config file; unknown fields are ignored."""
        return cls.from_dict(cls.read(path), str(path))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The fields of a config file, unchecked and possibly incomplete."""
        path = Path(path)
        if reason := not_a_file(path, "model config"):
            raise InputError(f"{path}: {reason} (see --model-config)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a JSON file: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: a model config is a JSON object")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> ModelConfig:
        """Make a config from the fields of a config file.

        Raises:
            InputError: fields are missing or invalid; all are listed.
        """
        problems = Problems()
        known = cls.native_names(values)
        for name in _REQUIRED:
            if name not in known:
                problems.add(source, f'"{name}" is missing')
        reasons = {name: _check(name, value) for name, value in known.items()}
        for name, reason in reasons.items():
            if reason:
                problems.add(source, f'"{name}" {reason}, this is {shown(known[name])}')
        sound = {name: value for name, value in known.items() if not reasons[name]}
        problems.extend(source, _contradictions(sound))
        problems.raise_if_any("the model config cannot be used:")
        masks = known.pop("mask_modules", ())
        return cls(**known, mask_modules=tuple((bool(a), bool(b)) for a, b in masks))

    @classmethod
    def native_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The known fields of a native or Hugging Face config, by native name."""
        names = {f.name for f in fields(cls)}
        known = {_HUGGING_FACE.get(key, key): value for key, value in values.items()}
        return {key: value for key, value in known.items() if key in names and value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The fields for a native config file."""
        values = asdict(self)
        if not self.mask_modules:
            del values["mask_modules"]
        if self.distance_scale == 16:
            del values["distance_scale"]
        return values

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields for a Hugging Face config file; all are given, as its defaults are others."""
        theirs = {ours: name for name, ours in _HUGGING_FACE.items()}
        values = {theirs.get(name, name): value for name, value in asdict(self).items()}
        values["mask_modules"] = self.mask_modules or None
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
        if is_number and value > _LARGEST_FLOAT:
            return "must be finite"
        return None if is_number and value > 0 else "must be a number above 0"
    if name == "mask_modules":
        pairs = isinstance(value, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(p in (0, 1) for p in pair)
            for pair in value
        )
        return None if pairs else "must be a list of pairs of true or false"
    least, most = _LEAST.get(name, 1), _MOST.get(name, _MOST_OF_A_SIZE)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if whole and value > most:
        return f"must be at most {most}"
    if name == "dim_model":
        # The rotary embedding works on two halves.
        return None if whole and value % 2 == 0 else "must be an even whole number above 0"
    return None if whole else f"must be a whole number from {least}"


def _contradictions(values: dict[str, Any]) -> Iterator[str]:
    """Contradictions between fields that are valid individually; some may be missing."""
    masks, layers = values.get("mask_modules"), values.get("num_layers")
    if masks and layers and len(masks) != layers:
        yield f'"mask_modules" has {len(masks)} pairs for {layers} layers'
    buckets = values.get("position_bias_num_buckets", ModelConfig.position_bias_num_buckets)
    distance = values.get("position_bias_max_distance", ModelConfig.position_bias_max_distance)
    if distance <= buckets // 4:
        yield (
            f'"position_bias_max_distance" must be more than a quarter of the {buckets} '
            f"position_bias_num_buckets, this is {distance}"
        )
