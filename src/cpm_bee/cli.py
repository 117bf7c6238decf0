"""What all entry scripts share: flags declared as dataclass fields, and their argument parser.

A script's flags are the fields of one frozen dataclass. A field holds everything about its flag,
with the help text in both languages:

    TRAINING = Group("training", "训练")

    @dataclass(frozen=True, kw_only=True)
    class Options(CommandOptions):
        script = "tool.py"
        ...
        batch_size: int = TRAINING.option(32, "rows a step", "每步的行数", type=positive)

`Options.parse()` reads the command line. `scripts/make_docs.py` makes docs/training.md and its
Chinese page from the same fields. A `bool` field is a switch; a field without `type` is text; the
default `REQUIRED` makes a flag that must be given. Help texts are Markdown: `--help` drops the
backticks.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar

from cpm_bee.errors import InputError

# Threads that wait for each other sleep, so that a busy neighbour does not stop them. OpenMP reads
# this when torch is loaded; every entry script imports this module before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REQUIRED: Any = dataclasses.MISSING
Parsed = TypeVar("Parsed", bound="CommandOptions")


@dataclass(frozen=True)
class Group:
    """A group of flags in `--help` and in the documentation."""

    title: str
    chinese: str

    def option(
        self,
        default: Any,
        help: str,
        chinese: str,
        *,
        type: Callable[[str], Any] | None = None,
        choices: Sequence[str] | None = None,
        metavar: str | None = None,
    ) -> Any:
        """A dataclass field that is a flag of this group.

        Args:
            default: the value when the flag is not given; `REQUIRED` where it must be.
            help: the meaning in English.
            chinese: the meaning in Chinese.
            type: makes the value from the text; raises `argparse.ArgumentTypeError`.
        """
        declared = {
            "group": self, "help": help, "chinese": chinese,
            "type": type, "choices": choices, "metavar": metavar,
        }  # fmt: skip
        return dataclasses.field(default=default, metadata=declared)


GENERAL = Group("general", "通用")


@dataclass(frozen=True)
class Flag:
    """A flag as it was declared."""

    name: str  # of the field
    default: Any
    is_switch: bool
    group: Group
    help: str
    chinese: str
    type: Callable[[str], Any] | None = None
    choices: Sequence[str] | None = None
    metavar: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        text = self.help.replace("`", "").replace("%", "%%")
        if self.is_switch:
            parser.add_argument(self.flag, action="store_true", help=text)
            return
        metavar = self.metavar
        if metavar is None and self.choices is None and self.type is not None:
            metavar = "N" if self.type in (whole_number, positive, not_negative) else "X"
        parser.add_argument(
            self.flag,
            default=None if self.required else self.default,
            required=self.required,
            type=self.type,  # type: ignore[arg-type]  # None, the default, leaves text
            choices=self.choices,
            metavar=metavar,
            help=text,
        )


# Every script has it, see `run_command`; no field holds it.
DEBUG = Flag(
    "debug", False, True, GENERAL, "show the traceback of an error", "出错时显示 traceback"
)


def flags_of(options: Any) -> list[Flag]:
    """The flags of a dataclass or of its instance, in the order of its fields."""
    return [
        Flag(field.name, field.default, field.type in (bool, "bool"), **field.metadata)
        for field in dataclasses.fields(options)
        if "group" in field.metadata
    ]


def check_values(options: Any) -> None:
    """Apply each flag's `type` to a value that did not come from the command line.

    Raises:
        InputError: a value is out of range; names the flag.
    """
    for flag in flags_of(options):
        value = getattr(options, flag.name)
        if value is None or flag.type is None:
            continue
        try:
            flag.type(str(value))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{flag.flag}: {error}") from None


class CommandOptions:
    """The flags of one script: the base of a frozen dataclass whose fields are options."""

    script: ClassVar[str]
    description: ClassVar[str]
    chinese: ClassVar[str]  # the description
    groups: ClassVar[tuple[Group, ...]]  # in the order of `--help`; GENERAL comes last
    hints: ClassVar[Mapping[str, str]] = {}  # see `cpm_bee.hints`

    @classmethod
    def parser(cls) -> ArgumentParser:
        parser = ArgumentParser(prog=cls.script, description=cls.description, hints=cls.hints)
        places: dict[Group, argparse._ActionsContainer] = {GENERAL: parser}
        for group in cls.groups:
            places[group] = parser.add_argument_group(group.title)
        for flag in cls.flags():
            flag.add_to(places[flag.group])
        return parser

    @classmethod
    def flags(cls) -> Iterator[Flag]:
        """The flags by group, without --debug."""
        order = [*cls.groups, GENERAL]
        return iter(sorted(flags_of(cls), key=lambda flag: order.index(flag.group)))

    @classmethod
    def parse(cls: type[Parsed], arguments: Sequence[str] | None = None) -> Parsed:
        values = vars(cls.parser().parse_args(arguments))
        return cls(**{flag.name: values[flag.name] for flag in cls.flags()})


def shown_default(value: object) -> str:
    """A default as a person would type it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).removesuffix(".0")


class _HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: ...)" where there is a default that the help does not tell already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # By identity: 0 equals False and is a default to show.
        no_default = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if no_default or "default" in text:
            return text
        return f"{text} (default: {shown_default(action.default).replace('%', '%%')})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's conventions.

    Flags are declared with hyphens and accepted with underscores too (`--eval_dataset`,
    `--eval-dataset`); abbreviations are refused; `--debug` is always there (see `run_command`).
    An unknown flag gets a hint: what other tools call so, or a flag that is spelled nearly so.

    Args:
        hints: flags of other tools, and what to write here for them.
    """

    def __init__(self, *, hints: Mapping[str, str] | None = None, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self._hints = hints or {}
        DEBUG.add_to(self)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = sys.argv[1:] if args is None else list(args)
        if not {"-h", "--help"} & set(arguments):
            # First: of `--train_file x` argparse would only say that --dataset is missing.
            self._check_flags(arguments)
        return super().parse_args(arguments, namespace)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_hyphenate(a) for a in arguments], namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\nsee: python {self.prog} --help")

    def _check_flags(self, arguments: Sequence[str]) -> None:
        unknown = []
        for argument in arguments:
            if argument == "--":
                break
            given = argument.partition("=")[0]
            # Text with a space is a value to argparse, also where it begins with a hyphen.
            if given.startswith("--") and " " not in argument and not self._knows(given):
                hint = self.hint(given)
                unknown.append(f"{given} (did you mean {hint}?)" if hint else given)
        if unknown:
            self.error(f"unrecognized arguments: {', '.join(unknown)}")

    def _knows(self, flag: str) -> bool:
        return _hyphenate(flag) in self._option_string_actions

    def hint(self, unknown: str) -> str | None:
        """What may be meant by an unknown flag, as it is to be written; None where nothing is."""
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


def real_number(minimum: float, *, exclusive: bool = False) -> Callable[[str], float]:
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


def comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
