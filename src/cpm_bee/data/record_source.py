"""Records from a binary dataset, from a file of JSON lines, or from standard input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee import records
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.record_file import STANDARD, Mapped, read_json_lines
from cpm_bee.errors import InputError
from cpm_bee.records import Record, without_marks


class LocatedRecord(NamedTuple):
    """A record, and where it comes from.

    Attributes:
        where: file:line, or file and byte.
        record: as the model sees it, a valid record.
        given: as it was read: with plain texts if they are plain, and with the fields that are
            kept from the model, in their order; without the marks of an earlier answer.
        kept: the fields that are not for the model, such as an id; of any JSON type.
    """

    where: str
    record: Record
    given: dict[str, Any]
    kept: dict[str, Any]


def located(
    where: str, value: Any, keep: Sequence[str] = (), escape: bool = False
) -> LocatedRecord:
    """Returns a value of a line as a record, which has yet to be validated; see `read_located`."""
    given = without_marks(value)
    if not isinstance(given, dict):
        return LocatedRecord(where, given, given, {})
    kept = {key: given[key] for key in keep if key in given}
    own = {key: text for key, text in given.items() if key not in kept}
    return LocatedRecord(where, records.escape_texts(own) if escape else own, given, kept)


def read_located(
    path: str, *, keep: Sequence[str] = (), escape: bool = False, limit: int | None = None
) -> list[LocatedRecord]:
    """Read the records of a folder that preprocess_dataset.py made, or of `read_records`.

    Args:
        limit: read only so many records.

    Raises:
        InputError: as `read_records`, or the folder is not such a one.
    """
    if path == STANDARD or not Path(path).is_dir():
        return list(read_records(path, keep=keep, escape=escape, limit=limit))
    dataset = BinaryDataset(path)
    found: list[LocatedRecord] = []
    for file_index, offset, _ in dataset:
        if limit is not None and len(found) >= limit:
            break
        record = dataset.read(file_index, offset)
        found.append(LocatedRecord(dataset.where(file_index, offset), record, record, {}))
    if not found:
        raise InputError(f"{path}: holds no records")
    return found


def read_records(
    path: str, *, keep: Sequence[str] = (), escape: bool = False, limit: int | None = None
) -> Sequence[LocatedRecord]:
    """The records of a file of JSON lines, all of them valid; "-" is standard input.

    They are not held in memory, each is read when it is asked for (see `record_file`).

    Args:
        keep: fields to take out of each record, as far as it has them.
        escape: its texts are plain; see `records.escape_texts`.
        limit: read only so many records.

    Raises:
        InputError: there is nothing to read, or records are not valid; all problems are listed.
    """

    def problems_of(where: str, value: Any) -> list[str]:
        return records.validate(located(where, value, keep, escape).record)

    remedy = 'a record is one line: {"input": "...", "<ans>": ""}, a literal < written <<'
    remedy += "" if escape else " (or give --escape)"
    lines = read_json_lines(path, problems_of, limit=limit, remedy=remedy)
    return Mapped(lambda line: located(*line, keep, escape), lines)
