"""Taking the fields of a JSON body one by one; what is left or wrong is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from cpm_bee.errors import shown
from cpm_bee.serve.api_errors import invalid

_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "an object", list: "a list"}


def parse(raw: bytes) -> Body:
    """Parse a body.

    Raises:
        ApiError: it is not a JSON object.
    """
    try:
        value = json.loads(raw)
    except RecursionError:
        raise invalid("the body is not valid JSON: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 text ({error.reason})") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid('the body is a JSON object, as in {"model": "..."}')
    return Body(value)


class Body:
    """The fields of a JSON object that have not been taken yet, and what was wrong with others.

    A field that is null counts as not given. Each problem is noted, and `finish` raises all.
    """

    def __init__(self, fields: dict[str, Any], path: str = "") -> None:
        self._left = dict(fields)
        self._path = path
        self._problems: list[tuple[str, str]] = []

    def problem(self, name: str, message: str) -> None:
        self._problems.append((self._path + name, message))

    def peek(self, name: str) -> Any:
        """A field as it was sent, which remains to be taken."""
        return self._left.get(name)

    def take(
        self,
        name: str,
        kind: type,
        default: Any = None,
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> Any:
        """Returns a field that must have this type, or the default."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and is_number:
            value = float(value) if abs(value) < 1e300 else math.inf
        elif kind is int and is_number and value == value // 1 and math.isfinite(value):
            value = int(value)
        elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.problem(name, f"expected {_NAMES[kind]}, got {shown(value)}")
            return default
        if kind is float and not math.isfinite(value):
            self.problem(name, "is not a finite number")
        elif least is not None and value < least:
            self.problem(name, f"{shown(value)} is below {least:g}")
        elif most is not None and value > most:
            self.problem(name, f"{shown(value)} is above {most:g}, the most that is allowed")
        else:
            return value
        return default

    def take_any(self, name: str) -> Any:
        return self._left.pop(name, None)

    def refuse(self, name: str, neutral: Collection[Any] = (), why: str = "") -> None:
        """Refuse a field that is not supported, unless its value asks for nothing."""
        value = self._left.pop(name, None)
        if value is None or any(value == own and type(value) is type(own) for own in neutral):
            return
        allowed = " or ".join(json.dumps(own) for own in neutral if own not in ([], {}, ""))
        hint = why or (f"only {allowed} is" if allowed else "leave it out")
        self.problem(name, f"is not supported ({hint})")

    def include(self, inner: Body) -> None:
        """Note the problems of an object within this one, all of whose fields have been taken."""
        inner._note_left()
        self._problems += inner._problems

    def finish(self) -> None:
        """Raise `ApiError` for all problems, and for fields that nobody has taken."""
        self._note_left()
        if self._problems:
            shown_problems = [f"{name}: {reason}" for name, reason in self._problems[:20]]
            code = "unsupported_parameter" if _is_unsupported(self._problems) else None
            raise invalid("; ".join(shown_problems), self._problems[0][0], code)

    def _note_left(self) -> None:
        for name, value in self._left.items():
            if value is not None:
                self.problem(name if len(name) <= 80 else f"{name[:80]}...", "is not known here")


def _is_unsupported(problems: list[tuple[str, str]]) -> bool:
    return all("not supported" in reason or "not known" in reason for _, reason in problems)
