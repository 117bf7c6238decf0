"""Records from a binary dataset, from a file of JSON lines, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee import json_lines, records
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.errors import InputError, Problems
from cpm_bee.paths import not_a_file
from cpm_bee.records import Record, without_marks

STANDARD = "-"  # names standard input and output


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
        return read_records(path, keep=keep, escape=escape, limit=limit)
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
) -> list[LocatedRecord]:
    """Read the records of a file of JSON lines; "-" is standard input.

    Args:
        keep: fields to take out of each record, as far as it has them.
        escape: its texts are plain; see `records.escape_texts`.
        limit: read only so many records.

    Raises:
        InputError: there is nothing to read, or records are not valid; all problems are listed.
    """
    problems = Problems()
    found: list[LocatedRecord] = []
    for number, line in _lines(path):
        if limit is not None and len(found) >= limit:
            break
        value, reason = json_lines.parse_line(line)
        one = located(f"{_name(path)}:{number}", value, keep, escape)
        reasons = [reason] if reason else records.validate(one.record)
        problems.extend(one.where, reasons)
        if not reasons:
            found.append(one)
    problems.raise_if_any(
        f"{_name(path)}: {problems.count} problems, nothing was written",
        'a record is one line: {"input": "...", "<ans>": ""}, a literal < written <<'
        + (" (or give --escape)" if not escape else ""),
    )
    if not found:
        raise InputError(f"{_name(path)}: holds no records")
    return found


def _name(path: str) -> str:
    return "standard input" if path == STANDARD else path


def _lines(path: str) -> Iterator[tuple[int, str]]:
    if path != STANDARD:
        if reason := not_a_file(path):
            hint = "; a pipe is read as standard input, with -" if Path(path).is_fifo() else ""
            raise InputError(f"{path}: {reason}{hint}")
        json_lines.check_is_lines(Path(path))
        yield from json_lines.read_lines(path)
        return
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        line, reason = json_lines.decode_line(raw, None, is_first=number == 1)
        if reason:
            raise InputError(f"standard input:{number}: {reason}")
        if line:
            yield number, line
