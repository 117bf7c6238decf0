"""Reads JSON that is not one value a line: an array, or objects over several lines.

The elements of an array are read one by one, so that a file may be larger than memory. An object
around a list (`{"data": [...]}`, as SQuAD and CMRC have it) is read as a whole, and stands for the
elements of the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_bee.errors import InputError
from cpm_bee.json_lines import DuplicateKeyError, unique_items

_WRAPPERS = ("data", "rows", "train", "examples", "instances", "questions")
MAX_VALUE = 1 << 28  # characters of one value; a file that is one object is a value


def json_values(path: Path, pieces: Iterator[str]) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line number, value, None), or (line number, None, reason) for an unusable value.

    Args:
        path: the file, for messages.
        pieces: its text.

    Raises:
        InputError: the text is not valid JSON, so that what follows cannot be read.
    """
    text = _Text(path, pieces)
    in_array = text.peek() == "["
    if in_array:
        text.skip()
    while text.peek() not in ("", "]" if in_array else ""):
        line = text.line
        try:
            value, reason = text.value(), None
        except DuplicateKeyError as error:
            key = json.dumps(str(error), ensure_ascii=False)
            value, reason = None, f"the key {key} appears twice; only one of its values can be kept"
        rows = None if in_array else _wrapped(value)
        if rows is None:
            yield line, value, reason
        else:
            for row in rows:
                yield line, row, None
        if text.peek() == ",":
            text.skip()
    if in_array and not text.peek():
        raise InputError(f"{path}:{text.line}: not valid JSON (the array is never closed)")


def _wrapped(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        lists = [v for k, v in value.items() if k in _WRAPPERS and isinstance(v, list)]
        if len(lists) == 1 and all(isinstance(row, (dict, list)) for row in lists[0]):
            return lists[0]
    return None


class _Text:
    """A text that is read piece by piece, and the number of the line at its position."""

    def __init__(self, path: Path, source: Iterator[str]) -> None:
        self._path = path
        self._source = source
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_items)
        self._text = ""
        self._position = 0
        self._is_complete = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self.skip()
            if self._is_complete:
                return ""
            self._read(1)

    def skip(self) -> None:
        self.line += self._text[self._position] == "\n"
        self._position += 1

    def value(self) -> Any:
        """Parse the value that begins here, and go to its end."""
        wanted = 1 << 16
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                # A number may go on in the next piece.
                if end < len(self._text) or self._is_complete:
                    self._go_to(end)
                    return value
            except DuplicateKeyError:
                self._skip_value()
                raise
            except json.JSONDecodeError as error:
                # One that ends with the text may only be cut off.
                if self._is_complete or len(self._text) - self._position > MAX_VALUE:
                    line = self.line + self._text.count("\n", self._position, error.pos)
                    raise InputError(f"{self._path}:{line}: not valid JSON ({error.msg})") from None
            except (RecursionError, ValueError) as error:
                raise InputError(f"{self._path}:{self.line}: not valid JSON ({error})") from None
            self._read(wanted)
            wanted *= 2  # so that a long value is not parsed from its beginning too often

    def _skip_value(self) -> None:
        _, end = json.JSONDecoder().raw_decode(self._text, self._position)
        self._go_to(end)

    def _go_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def _read(self, count: int) -> None:
        pieces = [self._text[self._position :]]
        size = 0
        while size < count:
            piece = next(self._source, None)
            if piece is None:
                self._is_complete = True
                break
            pieces.append(piece)
            size += len(piece)
        self._text = "".join(pieces)
        self._position = 0
