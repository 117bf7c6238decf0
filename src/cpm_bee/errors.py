"""Errors that a user can cause; `cli.run_command` reports them."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterable, Iterator

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxdict = 8


class CpmBeeError(Exception):
    """Base class of the errors that are reported as a message, without a traceback."""

    exit_status = 1


class RunError(CpmBeeError):
    """A run that started and then failed (exit status 1)."""


class InterruptedRun(RunError):
    """A signal ended a run after its state was saved (exit status 75, EX_TEMPFAIL)."""

    exit_status = 75


class InputError(CpmBeeError):
    """Wrong usage or bad input: a flag, a file, a record (exit status 2)."""

    exit_status = 2


def exit_status_of(error: BaseException) -> int:
    """The exit status of a command that an error ends: 130 for Ctrl-C, 1 for an unknown one."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_status if isinstance(error, CpmBeeError) else 1


class Problems:
    """Collects all problems of one input, to report them together.

    Counts all problems, but keeps the text of at most `max_shown` (a broken file can have millions
    of bad lines).
    """

    def __init__(self, max_shown: int = 1000) -> None:
        self._max_shown = max_shown
        self._lines: list[str] = []
        self.count = 0

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self._lines) < self._max_shown:
            self._lines.append(f"  {where}: {reason}")

    def extend(self, where: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            self.add(where, reason)

    def include(self, error: InputError) -> None:
        """Add an error's text, which may have several lines, as one problem; ignores repeats."""
        text = "  " + str(error).replace("\n", "\n  ")
        if text not in self._lines:
            self.count += 1
            if len(self._lines) < self._max_shown:
                self._lines.append(text)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Add an `InputError` or `OSError` that the block raises as a problem."""
        try:
            yield
        except InputError as error:
            self.include(error)
        except OSError as error:
            self.include(InputError(describe(error)))

    def text(self) -> str:
        more = self.count - len(self._lines)
        return "\n".join(self._lines + ([f"  ... and {more} more"] if more else []))

    def raise_if_any(self, header: str, remedy: str = "") -> None:
        """Raise `InputError` if there are problems; its text is header, problems and remedy."""
        if self.count:
            raise InputError("\n".join(filter(None, [f"{header}", self.text(), remedy])))


def shown(value: object) -> str:
    """A short representation of any value, for messages."""
    try:
        return _REPR.repr(value)
    except ValueError:  # a number with more digits than Python converts
        return f"a huge {type(value).__name__}"


def describe(error: Exception) -> str:
    """The text of an error for users; for an `OSError`, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    return str(error)
