"""The records of a file of JSON lines as a sequence that holds none of them.

A first pass checks all lines and keeps three numbers for each record: its line, the offset of that
line, and a checksum. A record is then read each time it is asked for, so a file may be larger than
memory and is read in any order. The file stays open: one that another takes the place of is read to
its end, and a line that is changed in place is an error, not another record.

Standard input is read in place where it is a file (`< records.jsonl`). Of a pipe the text is held,
since it can be read only once.
"""

from __future__ import annotations

import io
import sys
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

from cpm_bee import json_lines
from cpm_bee.errors import InputError, Problems
from cpm_bee.paths import not_a_file

STANDARD = "-"  # names standard input and output
Item = TypeVar("Item")
Field = TypeVar("Field")


class Mapped(Sequence[Field], Generic[Item, Field]):
    """What a function gives for each item of a sequence, computed each time it is asked for."""

    def __init__(self, function: Callable[[Item], Field], items: Sequence[Item]) -> None:
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Field: ...
    @overload
    def __getitem__(self, index: slice) -> Mapped[Item, Field]: ...
    def __getitem__(self, index: int | slice) -> Field | Mapped[Item, Field]:
        if isinstance(index, slice):
            return Mapped(self._function, self._items[index])
        return self._function(self._items[index])

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has equal items."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


class JsonLines(Sequence[tuple[str, Any]]):
    """(location, value) of each of some lines of a file of JSON lines, read when asked for.

    Takes 20 bytes of memory for a line.

    Raises:
        InputError: a line is not what it was when it was added.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Args: `file` is read by offsets; `name` is that of its locations."""
        self._file, self._name = file, name
        self._numbers, self._offsets, self._checksums = array("Q"), array("Q"), array("L")

    @classmethod
    def open(cls, path: str | Path) -> JsonLines:
        """No lines yet of a file, which is closed with the last reference to the result."""
        file = open(path, "rb")  # noqa: SIM115  # stays open
        lines = cls(file, str(path))
        weakref.finalize(lines, file.close)
        return lines

    def texts(self, *, of_file: bool = True) -> Iterator[tuple[str, str]]:
        """Adds the non-blank lines from the present place on, and yields them with their location.

        Args:
            of_file: whether there is a file that a command can convert.

        Raises:
            InputError: a line is not UTF-8 text.
        """
        offset = self._file.tell()
        for number, raw in enumerate(self._file, start=1):
            path = self._name if of_file else None
            text, reason = json_lines.decode_line(raw, path, is_first=number == 1)
            if reason:
                raise InputError(f"{self._name}:{number}: {reason}")
            if text:
                self.add(number, offset, raw)
                yield f"{self._name}:{number}", text
            offset += len(raw)

    def add(self, number: int, offset: int, raw: bytes) -> None:
        """Add a line, with its number in the file, from 1."""
        self._numbers.append(number)
        self._offsets.append(offset)
        self._checksums.append(_checksum(raw))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Any] | Sequence[tuple[str, Any]]:
        if isinstance(index, slice):
            return Mapped(self.__getitem__, range(len(self))[index])
        number = self._numbers[index]
        where = f"{self._name}:{number}"
        self._file.seek(self._offsets[index])
        raw = self._file.readline()
        if _checksum(raw) != self._checksums[index]:
            raise InputError(f"{where}: was changed while the file was read; start again")
        text, _ = json_lines.decode_line(raw, None, is_first=number == 1)
        return where, json_lines.parse_line(text)[0]


def _checksum(raw: bytes) -> int:
    # A last line without an end gets one where a line is appended.
    return zlib.crc32(raw.rstrip(b"\r\n"))


def read_json_lines(
    path: str,
    problems_of: Callable[[str, Any], list[str]],
    *,
    limit: int | None = None,
    remedy: str,
) -> JsonLines:
    """Check the lines of a file, or of standard input if `path` is "-".

    Args:
        problems_of: returns why the value of a line, given with its location, is wrong.
        limit: read only so many lines.
        remedy: the last line of the message about wrong lines.

    Raises:
        InputError: there is nothing to read, or lines are wrong; all problems are listed.
    """
    lines = _opened(path)
    name = "standard input" if path == STANDARD else path
    problems = Problems()
    for where, text in lines.texts(of_file=path != STANDARD):
        value, reason = json_lines.parse_line(text)
        problems.extend(where, [reason] if reason else problems_of(where, value))
        if limit is not None and len(lines) >= limit:
            break
    problems.raise_if_any(f"{name}: {problems.count} problems, nothing was written", remedy)
    if not lines:
        raise InputError(f"{name}: holds no records")
    return lines


def _opened(path: str) -> JsonLines:
    if path == STANDARD:
        file = sys.stdin.buffer
        return JsonLines(file if file.seekable() else io.BytesIO(file.read()), "standard input")
    if reason := not_a_file(path):
        hint = "; a pipe is read as standard input, with -" if Path(path).is_fifo() else ""
        raise InputError(f"{path}: {reason}{hint}")
    json_lines.check_is_lines(Path(path))
    return JsonLines.open(path)
