"""The errors a person can cause, and how a command reports them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from cpm_bee.distributed.rank import (
    RankInfo,
    end_torchrun_quietly,
    remove_empty_log_folders,
    reports,
)


class CpmBeeError(Exception):
    """Base of all errors that are reported by message instead of traceback."""

    exit_status = 1


class RunError(CpmBeeError):
    """A run that started well and failed (exit status 1)."""


class InputError(CpmBeeError):
    """Wrong usage or bad input: a flag, a file, a record (exit status 2)."""

    exit_status = 2


class Problems:
    """Collects everything wrong with one input, to report it in one go.

    Keeps at most `shown` lines of text (a broken file can have millions of bad lines), but
    counts all of them.
    """

    def __init__(self, shown: int = 1000) -> None:
        self._shown = shown
        self._lines: list[str] = []
        self.count = 0

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self._lines) < self._shown:
            self._lines.append(f"  {where}: {reason}")

    def extend(self, where: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            self.add(where, reason)

    def include(self, error: InputError) -> None:
        """Add an error's own text, which may have several lines, as one problem; once."""
        text = "  " + str(error).replace("\n", "\n  ")
        if text not in self._lines:
            self.count += 1
            if len(self._lines) < self._shown:
                self._lines.append(text)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Turn an `InputError` or `OSError` that ends the block into a problem."""
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
        """Raise `InputError` with the header, one line a problem and the remedy, if any."""
        if self.count:
            raise InputError("\n".join(filter(None, [f"{header}", self.text(), remedy])))


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry script's `main` and exit: errors of people become a message, not a traceback.

    Exit status: what `main` returns (None is 0), 2 for wrong usage or bad input, 1 for a failed
    run, 130 after Ctrl-C. `--debug` on the command line shows the traceback of any of them. Under
    torchrun the first worker of a machine reports for all.
    """
    debug = "--debug" in sys.argv
    status: int | None
    try:
        status = main()
        sys.stdout.flush()
        if RankInfo.of_this_process().local_rank == 0:
            remove_empty_log_folders()
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader of our output went away (`... | head`): end quietly. Without this the
        # interpreter would complain once more while flushing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except ModuleNotFoundError as error:
        if debug:
            raise
        print(
            f"error: the package {error.name!r} is not installed for {sys.executable}; "
            "in the project's folder: pip install -e . -c constraints.txt, or, after "
            "bash scripts/quickstart.sh: source .venv/bin/activate",
            file=sys.stderr,
        )
        status = 1
    except (CpmBeeError, OSError) as error:
        if debug:
            raise
        status = error.exit_status if isinstance(error, CpmBeeError) else 1
        if reports():
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        end_torchrun_quietly(status)
    sys.exit(status or 0)


def describe(error: Exception) -> str:
    """The text of an error for people; for one of the system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    return str(error)
