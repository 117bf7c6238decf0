"""Reads a receipt, which may come from anywhere: its checksum, its format, and its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_bee import checksums
from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.paths import not_a_file

FORMAT = 1
_MAX_BYTES = 16 << 20


def read_receipt(path: str | Path) -> dict[str, Any]:
    """Returns the values of a receipt.

    Raises:
        InputError: it is not one, or has been changed since it was written.
    """
    path = Path(path)
    if reason := not_a_file(path, "receipt"):
        raise InputError(f"{path}: {reason}")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path}: not a receipt, but a file of {path.stat().st_size:,} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a receipt ({error})") from None
    if not isinstance(values, dict) or "format" not in values:
        raise InputError(f"{path}: not a receipt (SAVE_NAME-receipt.json is one)")
    if not checksums.is_intact(values):
        raise InputError(
            f"{path}: this receipt has been changed since it was written (checksum), so nothing "
            "can be verified by it; put back the one that the run wrote"
        )
    if values["format"] != FORMAT:
        raise InputError(f"{path}: has format {values['format']!r}, this version reads {FORMAT}")
    problems = Problems()
    problems.extend(str(path), _shape_problems(values, _SHAPE, ""))
    problems.raise_if_any("this receipt was not written by cpm_bee:")
    return values


# What a receipt must have to be replayed; `?` marks what may be missing or null.
_INPUT = {"path": str, "fingerprint": str, "kind?": str, "value?": str}
_DATASET = {**_INPUT, "records": int}
_PART = {
    "steps_before": int,
    "folder": str,
    "settings": dict,
    "code": {"source?": str, "commit?": str, "changed?": bool},
    "environment": {
        **{"threads": int, "ranks": int, "dtype": str, "device": str, "attention": str},
        **{"sharded": bool, "checkpointing": bool, "variables": dict, "gpu?": str},
    },
    "data": {"dataset": [{**_DATASET, "weight": float}], "eval-dataset?": [_DATASET]},
    "vocabulary": _INPUT,
    "base": {
        **{"path?": str, "fingerprint": str},
        "files": [{"name": str, "bytes": int, "kind?": str, "value?": str}],
    },
    "init_delta?": {"path": str, "sha256": str},
}
_RESULT = {
    "step?": int,
    "weights?": {"last?": {"file": str}},
    "log?": {"bytes": int, "sha256": str},
}
_SHAPE = {"status": str, "parts": [_PART], "result?": _RESULT}


def _shape_problems(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Yields what a value lacks of a shape: a type, a list of one, or a dictionary of some."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for name, inner in shape.items():
            found = value.get(name.removesuffix("?"))
            if not (name.endswith("?") and found is None):
                yield from _shape_problems(found, inner, f"{where}/{name.removesuffix('?')}")
    elif isinstance(shape, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _shape_problems(item, shape[0], f"{where}/{number}")
    elif isinstance(shape, (dict, list)) or not isinstance(value, shape):
        yield f"{where} is {shown(value)}"
