"""Command-line support for all entry scripts: the parser, its number types, `run_command`."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NoReturn

from cpm_bee import language
from cpm_bee.distributed.rank import is_reporting_rank, report_error
from cpm_bee.distributed.rank import record as record_failure
from cpm_bee.errors import DISK_FULL, CpmBeeError, InputError, describe, exit_status_of, naming

# Waiting threads sleep instead of spinning, so that another busy process does not stall them.
# OpenMP reads this when torch is loaded; every entry script imports this module before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DEBUG_HELP, DEBUG_HELP_CHINESE = "show the traceback of an error", "出错时显示 traceback"


def shown_default(value: object) -> str:
    """A default value as a user would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0")


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag on a command line that is not parsed yet, the last one if there are
    several; None without."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == flag and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


class _HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: ...)" if there is a default and the help text does not state it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # Compared by identity: 0 equals False but is a default worth showing.
        no_default = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if no_default or "default" in text or "默认" in text:
            return text
        value = shown_default(action.default).replace("%", "%%")
        return text + (f"（默认：{value}）" if language.is_chinese() else f" (default: {value})")

    def _split_lines(self, text: str, width: int) -> list[str]:
        if language.is_chinese():
            return language.wrapped(text, width)
        return super()._split_lines(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if language.is_chinese():
            lines = language.wrapped(text, width - len(indent))
            return "\n".join(indent + line for line in lines)
        return super()._fill_text(text, width, indent)

    def add_usage(self, usage, actions, groups, prefix=None):  # type: ignore[no-untyped-def]
        if prefix is None and language.is_chinese():
            prefix = "用法："
        super().add_usage(usage, actions, groups, prefix)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's conventions.

    Flags are declared with hyphens and accepted with underscores too (`--eval_dataset`,
    `--eval-dataset`); abbreviations are refused; `--debug` and `--lang` are always defined (see
    `run_command`). Help is in the user's language when the parser is made.
    The error for an unknown flag suggests the equivalent of another tool's flag, or a flag with a
    similar spelling.

    Args:
        hints: flags of other tools and their equivalents here.
    """

    def __init__(self, *, hints: Mapping[str, str] | None = None, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)  # type: ignore[arg-type]
        self._hints = hints or {}
        chinese = language.is_chinese()
        if chinese:
            self._optionals.title, self._positionals.title = "选项", "位置参数"
        help_help = "显示本帮助并退出" if chinese else "show this help message and exit"
        self.add_argument("-h", "--help", action="help", help=help_help)
        debug_help = DEBUG_HELP_CHINESE if chinese else DEBUG_HELP
        self.add_argument("--debug", action="store_true", help=debug_help)
        lang_help = language.LANG_HELP_CHINESE if chinese else language.LANG_HELP
        self.add_argument(
            "--lang",
            choices=language.LANGUAGES,
            default=language.AUTO,
            help=lang_help.replace("`", ""),
        )

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = sys.argv[1:] if args is None else list(args)
        if not {"-h", "--help"} & set(arguments):
            # Before argparse: given `--train_file x`, it would only say that --dataset is missing.
            self._check_flags(arguments)
        return super().parse_args(arguments, namespace)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_hyphenate(a) for a in arguments], namespace)

    def make_optional(self, names: Container[str]) -> None:
        """Leave arguments that are not given out of the result, as their values are elsewhere."""
        for action in self._actions:
            if action.dest in names:
                action.required, action.default = False, argparse.SUPPRESS
                if not action.option_strings:
                    action.nargs = "?"

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\nsee: python {self.prog} --help")

    def _check_flags(self, arguments: Sequence[str]) -> None:
        unknown = []
        for argument in arguments:
            if argument == "--":
                break
            given = argument.partition("=")[0]
            # argparse takes text with a space as a value, even if it begins with a hyphen.
            if given.startswith("--") and " " not in argument and not self._knows(given):
                hint = self.hint(given)
                unknown.append(f"{given} (did you mean {hint}?)" if hint else given)
        if unknown:
            self.error(f"unrecognized arguments: {', '.join(unknown)}")

    def _knows(self, flag: str) -> bool:
        return _hyphenate(flag) in self._option_string_actions

    def hint(self, unknown: str) -> str | None:
        """The flag that was probably meant, as it should be written; None if unclear."""
        flag = _hyphenate(unknown).lower()
        if flag in self._hints:
            return self._hints[flag]
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        near = [name for name in known if name.startswith(flag[2:])]
        near = near or difflib.get_close_matches(flag[2:], known, n=1, cutoff=0.75)
        return " or ".join(f"--{name}" for name in near[:3]) or None


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def whole_number(text: str) -> int:
    """An integer; `1.` and `1.0` are accepted because copied tutorial scripts contain them."""
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


def real_number(minimum: float, *, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite float of at least (or, if exclusive, above) `minimum`."""

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


def share(*, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from 0 (exclusive, if so) to 1."""
    number = real_number(0, exclusive=exclusive)

    def parse(text: str) -> float:
        value = number(text)
        if value > 1:
            raise argparse.ArgumentTypeError(f"{text} is above 1")
        return value

    return parse


def comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def command_line(*flags: str) -> str:
    """The command that started this process, quoted for a shell; adds the `flags` that it lacks."""
    return shlex.join([*sys.orig_argv, *(f for f in flags if f not in sys.orig_argv)])


class _MessageHandler(logging.Handler):
    """Prints the library's messages above a progress bar, on one rank of each machine."""

    def emit(self, record: logging.LogRecord) -> None:
        from cpm_bee.progress import print_above_bar  # tqdm may not be installed

        if is_reporting_rank():
            level = record.levelname.lower()
            level = f"{language.said(level)}: " if record.levelno > logging.INFO else ""
            print_above_bar(level + language.said(record.getMessage()), file=sys.stderr)


def _prepare_output() -> None:
    """Make output robust against the terminal's encoding, and show the library's messages."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    library = logging.getLogger("cpm_bee")
    library.setLevel(logging.INFO)
    if not library.handlers:
        library.addHandler(_MessageHandler())


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry script's `main` and exit; user errors print a message, not a traceback.

    The exit status is what `main` returns (None is 0), 2 for wrong usage or bad input, 1 for a
    failed run or output that cannot be written, and 130 after Ctrl-C. With `--debug` the traceback
    is shown. Under torchrun an error is printed once (see `distributed.rank`). A message is in the
    user's language and ends its first line with its code (see `error_codes`).
    """
    language.choose(last_value(sys.argv[1:], "--lang"))
    _prepare_output()
    debug = "--debug" in sys.argv

    def message_of(error: BaseException) -> str | None:
        return None if debug else _message_of(error)

    def reporting_main() -> int | None:
        try:
            with naming("standard output", DISK_FULL):  # all files have names
                result = main()
                sys.stdout.flush()
            return result
        except Exception as error:
            if (message := message_of(error)) is not None:
                from cpm_bee.error_codes import with_code  # loads the tables

                report_error(with_code(message, language.current()))
            raise

    status: int | None
    try:
        status = record_failure(reporting_main, lambda error: message_of(error) is not None)()
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        if is_reporting_rank():
            print(language.said("interrupted"), file=sys.stderr)
        status = exit_status_of(interrupt)
    except BrokenPipeError:
        status = 1  # the reader of our output has gone (`... | head`): exit quietly
    except Exception as error:
        if message_of(error) is None:
            raise
        status = exit_status_of(error)
    _drop_unwritten_output()
    sys.exit(status or 0)


def _drop_unwritten_output() -> None:
    """Have the interpreter not report the failure of stdout again while it flushes it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message_of(error: BaseException) -> str | None:
    """The message for an error that a user can cause; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name!r} is not installed for {sys.executable}; "
            "in the project's folder: pip install -e . -c constraints.txt, or, after "
            "bash scripts/quickstart.sh: source .venv/bin/activate"
        )
    if isinstance(error, (CpmBeeError, OSError)) and not isinstance(error, BrokenPipeError):
        return describe(error)
    return None
