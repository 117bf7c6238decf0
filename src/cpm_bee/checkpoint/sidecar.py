"""The sidecar: a JSON file beside a weights file, with the weights' metadata.

`run-best.json` is the sidecar of `run-best.pt`. A full model's sidecar has `config`, `vocab` and
`base_fingerprint`; a delta's has `rank`, `alpha`, `targets` and `base_fingerprint`.

A sidecar gets lost when a file is copied alone. A delta therefore holds the same values in itself
too: as a JSON text in a tensor of bytes, so that its file stays a flat dictionary of tensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpm_bee import __version__
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file

METADATA = "cpm_bee.metadata"  # the name of the tensor of bytes
_MAX_METADATA = 1 << 16  # bytes

_LARGEST = 2**63  # of integers: larger ones may overflow a float, and no size is that large


def sidecar_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def read_sidecar(weights: Path) -> dict[str, Any]:
    """The contents of a weights file's sidecar; empty if there is none.

    Raises:
        InputError: the sidecar is not a JSON object, or has numbers that are not finite.
    """
    path = sidecar_path(weights)
    # An index of shards has this name itself, and so may the model's config.
    if path in (weights, weights.parent / "config.json") or not path.is_file():
        return {}
    try:
        return _parse(path.read_bytes())
    except ValueError as error:
        raise _refusal(path, weights, str(error)) from None


def write_sidecar(weights: Path, values: dict[str, Any]) -> None:
    """Write the sidecar of a weights file: `values` and the version of this package."""
    values = {**values, "written_by": f"cpm_bee {__version__}"}
    with atomic_file(sidecar_path(weights)) as file:
        file.write(json.dumps(values, indent=2) + "\n")


def metadata_tensor(values: dict[str, Any]) -> torch.Tensor:
    """The values, with what wrote them, as a JSON text in a tensor of bytes, uint8 [n]."""
    text = json.dumps({**values, "written_by": f"cpm_bee {__version__}"})
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())


def read_metadata(path: Path, tensor: Any) -> dict[str, Any]:
    """The values of a `metadata_tensor` that is in the file `path`.

    Raises:
        InputError: it is something else.
    """
    try:
        if not torch.is_tensor(tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError("a tensor of bytes is expected")
        if tensor.layout != torch.strided or tensor.is_meta or len(tensor) > _MAX_METADATA:
            raise ValueError(f"at most {_MAX_METADATA} bytes are expected")
        return _parse(tensor.numpy().tobytes())
    except ValueError as error:
        raise InputError(
            f"{path}: its {METADATA} is damaged ({error}); put an intact copy of the file there"
        ) from None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(
            content.decode("utf-8"),
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # JSON, text encoding, numbers
        raise ValueError(f"not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("a JSON object is expected")
    return values


def _refusal(path: Path, weights: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: {reason}\nit should describe {weights.name}: restore it, or move it elsewhere "
        f"(mv {path} {path}.unreadable) to load {weights.name} without it"
    )


def _whole_number(text: str) -> int:
    number = int(text)
    if abs(number) > _LARGEST:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
