"""Records from a binary dataset or from a file of JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee import json_lines, records
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.errors import InputError, Problems
from cpm_bee.records import Record, without_marks


class LocatedRecord(NamedTuple):
    """A record with its location (file:line, or file and byte) and the fields kept from the model.

    Attributes:
        kept: fields that are not for the model, such as an id; of any JSON type.
    """

    where: str
    record: Record
    kept: dict[str, Any]


def read_located(
    path: str, *, keep: Sequence[str] = (), escape: bool = False, limit: int | None = None
) -> list[LocatedRecord]:
    """Read the records of a folder that preprocess_dataset.py made, or of a file of JSON lines.

    Args:
        keep: fields to take out of each record of a file, as far as it has them.
        escape: the texts of a file are plain; see `records.escape_texts`.
        limit: read only so many records.

    Raises:
        InputError: there is nothing to read, or records are not valid; all problems are listed.
    """
    if Path(path).is_dir():
        found = _from_dataset(BinaryDataset(path), limit)
    else:
        found = _from_file(path, keep, escape, limit)
    if not found:
        raise InputError(f"{path}: holds no records")
    return found


def _from_dataset(dataset: BinaryDataset, limit: int | None) -> list[LocatedRecord]:
    found: list[LocatedRecord] = []
    for file_index, offset, _ in dataset:
        if limit is not None and len(found) >= limit:
            break
        record = dataset.read(file_index, offset)
        found.append(LocatedRecord(dataset.where(file_index, offset), record, {}))
    return found


def _from_file(
    path: str, keep: Sequence[str], escape: bool, limit: int | None
) -> list[LocatedRecord]:
    if Path(path).is_file():
        json_lines.check_is_lines(Path(path))
    problems = Problems()
    found: list[LocatedRecord] = []
    for number, line in json_lines.read_lines(path):
        if limit is not None and len(found) >= limit:
            break
        value, reason = json_lines.parse_line(line)
        value = without_marks(value)
        kept = {}
        if isinstance(value, dict):
            kept = {key: value.pop(key) for key in keep if key in value}
        record = records.escape_texts(value) if escape else value
        reasons = [reason] if reason else records.validate(record)
        problems.extend(f"{path}:{number}", reasons)
        if not reasons:
            found.append(LocatedRecord(f"{path}:{number}", record, kept))
    problems.raise_if_any(f"{path}: {problems.count} problems:")
    return found
