"""Shared by the scripts of this folder: arguments, atomic output, errors without a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Works even if the project is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from cpm_bee.cli import ArgumentParser, positive, run_command, whole_number
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file

__all__ = [
    "ArgumentParser",
    "InputError",
    "positive",
    "run_command",
    "whole_number",
    "write_json_lines",
    "write_lines",
]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 text file, atomically."""
    with atomic_file(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def write_json_lines(path: Path, make: Callable[[], Any], count: int) -> None:
    """Write `count` generated records, one per line."""
    from tqdm import tqdm

    numbers = tqdm(range(count), desc=path.name, unit=" records", disable=None)
    write_lines(path, (json.dumps(make(), ensure_ascii=False) for _ in numbers))
