"""What all entry scripts share: the argument parser, its number types, and `run_command`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cpm_bee.distributed.rank import is_reporting_rank, record, report_error
from cpm_bee.errors import CpmBeeError, InputError


class _HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: ...)" where there is a default that the help does not tell already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's conventions.

    Flags are declared with hyphens and accepted with underscores too (`--eval_dataset`,
    `--eval-dataset`); abbreviations are refused; `--debug` is always there (see
    `run_command`).
    """

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_hyphenate(a) for a in arguments], namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\nsee: python {self.prog} --help")


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def whole_number(text: str) -> int:
    """An integer; `1.` and `1.0` are accepted, as copied tutorial scripts contain them."""
    try:
        value = float(text)
        if value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    return int(text) if text.lstrip("+-").isdigit() else int(value)


def positive(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def not_negative(text: str) -> int:
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def real_number(minimum: float, *, exclusive: bool = False):  # type: ignore[no-untyped-def]
    """A type for argparse: a finite float, at least (or, if exclusive, above) `minimum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not minimum <= value < float("inf") or (exclusive and value == minimum):
            relation = "above" if exclusive else "at least"
            raise argparse.ArgumentTypeError(f"{text} is not {relation} {minimum:g} and finite")
        return value

    return parse


def comma_list(text: str) -> Sequence[str]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry script's `main` and exit: errors of people become a message, not a traceback.

    Exit status: what `main` returns (None is 0), 2 for wrong usage or bad input, 1 for a failed
    run, 130 after Ctrl-C. `--debug` on the command line shows the traceback of any of them. Under
    torchrun an error is printed once (see `distributed.rank`).
    """
    # Threads that spin while they wait starve a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv

    def describe(error: BaseException) -> str | None:
        return None if debug else _describe(error)

    def reporting_main() -> int | None:
        try:
            return main()
        except Exception as error:
            if (message := describe(error)) is not None:
                report_error(message)
            raise

    status: int | None
    try:
        status = record(reporting_main, lambda error: describe(error) is not None)()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if debug:
            raise
        if is_reporting_rank():
            print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader of our output went away (`... | head`): end quietly. Without this the
        # interpreter would complain once more while flushing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if describe(error) is None:
            raise
        status = error.exit_status if isinstance(error, CpmBeeError) else 1
    sys.exit(status or 0)


def _describe(error: BaseException) -> str | None:
    """The message of an error that a person can cause; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name!r} is not installed for {sys.executable}; "
            "in the project's folder: pip install -e . -c constraints.txt, or, after "
            "bash scripts/quickstart.sh: source .venv/bin/activate"
        )
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}" if error.strerror else str(error)
    return str(error) if isinstance(error, CpmBeeError) else None
