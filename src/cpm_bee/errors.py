"""Errors that a user can cause; `cli.run_command` reports them."""

from __future__ import annotations

import contextlib
import errno
import reprlib
from collections.abc import Container, Iterable, Iterator

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxdict = 8

# A disk, a quota or a limit of the file size (ulimit -f) is used up.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A path that cannot be what it was given as: the user's mistake, not a failure of the run.
_WRONG_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO),
)


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


class DamagedFile(InputError):
    """A file that does not hold what was written to it: a checksum differs, or it is cut off."""


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
        if error.filename and error.errno in DISK_FULL:
            return f"{error.filename}: cannot be written: {error.strerror}"
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    return str(error)


def exit_status_of(error: BaseException) -> int:
    """The exit status for an error: 2 for wrong usage or bad input, 1 for a failed run.

    It is 130 for Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, CpmBeeError):
        return error.exit_status
    is_wrong_path = isinstance(error, OSError) and error.filename and error.errno in _WRONG_PATH
    return 2 if is_wrong_path else 1


@contextlib.contextmanager
def naming(path: object, numbers: Container[int | None] | None = None) -> Iterator[None]:
    """Put the name of a file into an `OSError` that lacks one, as those of writing do.

    Args:
        numbers: only into errors with these numbers.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and (numbers is None or error.errno in numbers):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def keeping(kept: str) -> Iterator[None]:
    """Say what a failure to write leaves in place: an `OSError` becomes a `RunError` with `kept`.

    Only for a full disk or a failing device: other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EIO):
            raise
        raise RunError(f"{describe(error)}; {kept}") from error
