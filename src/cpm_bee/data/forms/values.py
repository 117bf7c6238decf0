"""Values of a row as text: what is text already, and numbers and lists where that is asked for."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any

from cpm_bee.data.forms.rows import json_kind


class BadRow(Exception):
    """A row cannot become a record; the text says why."""


@dataclass(frozen=True)
class Texts:
    """How values become texts.

    Attributes:
        numbers: numbers, dates and true or false become text.
        separator: lists of texts become a text, with this between them; None refuses them.
    """

    numbers: bool = False
    separator: str | None = None

    def of(self, value: Any, name: str) -> str:
        """The text of a value; "" for null.

        Raises:
            BadRow: it is no text, and has not been asked for as one.
        """
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)) and self.separator is not None:
            return self.separator.join(self.of(part, name) for part in value)
        if isinstance(value, (bool, int, float, *_DATES)):
            if self.numbers:
                return str(value.isoformat() if isinstance(value, _DATES) else _number(value))
            raise BadRow(
                f"{name} is {json_kind(value)}, expected text (--numbers-as-text writes it as text)"
            )
        hint = " (--join-lists SEPARATOR makes one text of it)" if isinstance(value, list) else ""
        raise BadRow(f"{name} is {json_kind(value)}, expected text{hint}")


_DATES = (datetime.date, datetime.datetime, datetime.time)


def _number(value: bool | int | float) -> str:
    # As JSON writes it: true, and not True.
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def structure(value: Any) -> Any:
    """A list or object; one that is JSON in a text, as in a cell of a table, is parsed."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
