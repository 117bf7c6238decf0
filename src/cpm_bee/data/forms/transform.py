"""The user's own function that changes rows: `--transform FILE.py:FUNCTION`.

This runs code, so the file comes from the command line alone, never from data.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpm_bee.data.forms.values import BadRow
from cpm_bee.errors import InputError
from cpm_bee.paths import not_a_file

Transform = Callable[[Any], list[Any]]


def load_transform(given: str) -> Transform:
    """Load the function; what it returns is made a list, and its errors bad rows.

    Raises:
        InputError: there is no such file or function, or the file cannot be run.
    """
    name, colon, function = given.rpartition(":")
    if not (name and colon and function.isidentifier()):
        raise InputError(f"--transform {given}: expected FILE.py:FUNCTION")
    path = Path(name)
    if reason := not_a_file(path):
        raise InputError(f"--transform {path}: {reason}")
    spec = importlib.util.spec_from_file_location("cpm_bee_transform", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--transform {path}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--transform {path}: cannot be run: {_described(error, path)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(
            f"--transform {path}: has no function {function}"
            + (f"; it has {', '.join(names)}" if names else "")
        )

    def transform(row: Any) -> list[Any]:
        try:
            result = found(row)
        except Exception as error:
            raise BadRow(f"{function} failed: {_described(error, path)}") from None
        if result is None:
            return []
        results = result if isinstance(result, list) else [result]
        for part in results:
            if not isinstance(part, dict):
                kind = type(part).__name__
                raise BadRow(f"{function} returned {kind}, expected a dictionary, a list or None")
        return results

    return transform


def _described(error: Exception, path: Path) -> str:
    """The error and, as far as it is known, the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f" ({path}:{lines[-1]})" if lines else ""
    return (
        f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}{where}"
    )
