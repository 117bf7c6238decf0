"""Few-shot examples: answered records that the model sees with every record (--examples)."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from cpm_bee.data.record_source import read_located
from cpm_bee.errors import InputError, Problems
from cpm_bee.paths import not_a_file
from cpm_bee.records import ANSWER, Record, has_answer


def read_examples(path: str | None, *, escape: bool = False) -> list[Record]:
    """Read the records of `--examples`; none without a file.

    Args:
        escape: their texts are plain.

    Raises:
        InputError: the file is not there, or records are not valid or have no answer; all are
            listed.
    """
    if path is None:
        return []
    if reason := not_a_file(path):
        raise InputError(f"--examples {path}: {reason}")
    located = read_located(path, escape=escape)
    problems = Problems()
    for one in located:
        if not has_answer(one.record[ANSWER]):
            problems.add(one.where, f"has no answer ({ANSWER} is empty)")
    problems.raise_if_any(f"--examples {path}: examples show the model how to answer:")
    return [one.record for one in located]


def example_settings(path: str | None) -> dict[str, Any]:
    """What decides the answers, by flag; nothing without a file."""
    if path is None:
        return {}
    return {"--examples": f"sha256 {sha256(Path(path).read_bytes()).hexdigest()[:12]}"}
