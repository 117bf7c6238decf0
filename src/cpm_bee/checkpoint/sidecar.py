"""The sidecar: a JSON file beside the weights that this project saves, with what they belong to.

`run-best.json` is beside `run-best.pt`. A full model's holds `config`, `vocab` and
`base_fingerprint`, a delta's `rank`, `alpha`, `targets` and `base_fingerprint`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cpm_bee import __version__
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file

_LARGEST = 2**63  # of whole numbers: larger ones are no float, and no size of anything


def sidecar_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def read_sidecar(weights: Path) -> dict[str, Any]:
    """The sidecar of a file of weights; empty if there is none.

    Raises:
        InputError: the file is not a JSON object, or has numbers that are not finite.
    """
    path = sidecar_path(weights)
    # An index of shards is itself such a name, and the model's config may be.
    if path in (weights, weights.parent / "config.json") or not path.is_file():
        return {}
    try:
        values = json.loads(
            path.read_text(encoding="utf-8"),
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
        )
    except RecursionError:
        raise _refusal(path, weights, "nested too deeply") from None
    except ValueError as error:  # JSON, text encoding, numbers
        raise _refusal(path, weights, f"not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise _refusal(path, weights, "a JSON object is expected")
    return values


def write_sidecar(weights: Path, values: dict[str, Any]) -> None:
    """Write `values` beside a file of weights, with what wrote them."""
    values = {**values, "written_by": f"cpm_bee {__version__}"}
    with atomic_file(sidecar_path(weights)) as file:
        file.write(json.dumps(values, indent=2) + "\n")


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
