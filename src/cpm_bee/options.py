"""Command-line flags, declared once as the fields of a dataclass.

A script's flags are the fields of one frozen dataclass. Each field holds everything about its
flag, with the help text in both languages:

    TRAINING = Group("training", "训练")

    @dataclass(frozen=True, kw_only=True)
    class Options(CommandOptions):
        script = "tool.py"
        ...
        batch_size: int = TRAINING.option(32, "rows per step", "每步的行数", type=positive)

`Options.parse()` reads the command line. `scripts/make_docs.py` makes the flag tables of docs/ and
docs/zh/ from the same fields. A `bool` field is a switch; a field without `type` is text; a flag
with the default `REQUIRED` must be given. Help texts are Markdown: `--help` drops the backticks.

Every script also has `--config FILE`, which gives flags in a YAML file (`config_file`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from cpm_bee import config_file
from cpm_bee.cli import (
    DEBUG_HELP,
    DEBUG_HELP_CHINESE,
    ArgumentParser,
    comma_list,
    last_value,
    not_negative,
    positive,
    real_number,
    whole_number,
)
from cpm_bee.errors import InputError
from cpm_bee.language import AUTO, LANG_HELP, LANG_HELP_CHINESE, LANGUAGES, choose, is_chinese

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
        bare: str | None = None,
        repeated: bool = False,
        words: Callable[[Sequence[str]], Any] | None = None,
        positional: bool = False,
    ) -> Any:
        """Returns a dataclass field that declares a flag of this group.

        Args:
            default: the value if the flag is not given; `REQUIRED` if it must be given.
            help: the help text in English.
            chinese: the help text in Chinese.
            type: converts the text to the value; raises `argparse.ArgumentTypeError`.
            bare: the value if the flag is given without one; None if it needs one.
            repeated: the flag may be given several times; the value is a tuple.
            words: the flag may have any number of words; converts them to the value; raises
                `InputError`.
            positional: it is given by its place, without the name of a flag.
        """
        declared = {
            "group": self, "help": help, "chinese": chinese,
            "type": type, "choices": choices, "metavar": metavar, "bare": bare,
            "repeated": repeated, "words": words, "positional": positional,
        }  # fmt: skip
        return dataclasses.field(default=default, metadata=declared)


GENERAL = Group("general", "通用")


def model_config_option(group: Group) -> Any:
    """Returns the field of `--model-config`."""
    return group.option(
        "auto",
        "config file of the model; `auto` reads the sizes from the checkpoint",
        "模型配置文件；`auto` 表示从检查点推断",
        metavar="FILE",
    )


def vocab_option(group: Group) -> Any:
    """Returns the field of `--vocab`."""
    return group.option(
        None,
        "vocabulary; `vocab.txt` beside the checkpoint when not given",
        "词表；不指定时用检查点旁边的 `vocab.txt`",
        metavar="FILE",
    )


def recorded_alpha_option(group: Group) -> Any:
    """Returns the field of `--delta-alpha` of scripts that read a delta."""
    return group.option(
        None,
        "alpha of a delta that does not record it (another tool's, without a `.json`); 16 when "
        "not given",
        "增量文件未记录 alpha（由其他工具保存、旁边没有 `.json`）时使用的 alpha；不指定时为 16",
        type=real_number(0, exclusive=True),
    )


def keep_option(group: Group) -> Any:
    """Returns the field of `--keep`."""
    return group.option(
        (),
        "fields of a file's records that are not shown to the model, such as `id,source`; their "
        "values may be of any kind",
        "记录文件中不给模型看的字段，如 `id,source`；其值可以是任意 JSON 类型",
        type=comma_list,
        metavar="FIELDS",
    )


def verify_option(group: Group) -> Any:
    """Returns the field of `--verify`, which several scripts have."""
    return group.option(
        False,
        "read the whole base model first and compare it with its checksums (those of a "
        "`torch.save` file, or the SHA-256 of its release); files without checksums are named",
        "先通读基座模型，与其校验和比对（`torch.save` 文件自带的，或发布方的 SHA-256）；"
        "没有校验和的文件会被指出",
    )


@dataclass(frozen=True)
class Flag:
    """The declaration of a flag."""

    name: str  # of the field
    default: Any
    is_switch: bool
    group: Group
    help: str
    chinese: str
    type: Callable[[str], Any] | None = None
    choices: Sequence[str] | None = None
    metavar: str | None = None
    bare: str | None = None
    repeated: bool = False
    words: Callable[[Sequence[str]], Any] | None = None
    positional: bool = False
    is_list: bool = False  # texts, separated by commas
    is_mapping: bool = False  # NAME=TEXT, separated by commas

    @property
    def flag(self) -> str:
        """What is typed before the value; for a positional one, what stands for the value."""
        if self.positional:
            return self.metavar or self.name.upper()
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        text = self.chinese if is_chinese() else self.help
        text = text.replace("`", "").replace("%", "%%")
        if self.is_switch:
            parser.add_argument(self.flag, action="store_true", help=text)
            return
        metavar = self.metavar
        if metavar is None and self.choices is None and self.type is not None:
            metavar = "N" if self.type in (whole_number, positive, not_negative) else "X"
        nargs: dict[str, Any] = {} if self.bare is None else {"nargs": "?", "const": self.bare}
        if self.words is not None:
            nargs = {"nargs": "*"}
        if self.positional:
            parser.add_argument(self.name, metavar=metavar, type=self.type, help=text)  # type: ignore[arg-type]
            return
        parser.add_argument(
            self.flag,
            action="append" if self.repeated else "store",
            default=None if self.required else self.default,
            required=self.required,
            type=self.type,  # type: ignore[arg-type]  # None, the default, leaves text
            choices=self.choices,
            metavar=metavar,
            help=text,
            **nargs,
        )


# Every script has these flags; they are no fields because `cli.run_command` looks for them.
DEBUG = Flag("debug", False, True, GENERAL, DEBUG_HELP, DEBUG_HELP_CHINESE)
LANG = Flag("lang", AUTO, False, GENERAL, LANG_HELP, LANG_HELP_CHINESE, choices=LANGUAGES)
# So has it this one, whose file has values of fields.
CONFIG = Flag(
    "config",
    None,
    False,
    GENERAL,
    "YAML file with settings, one `FLAG: VALUE` a line; flags on the command line override it",
    "YAML 设置文件，每行一个 `FLAG: VALUE`（参数名: 值）；命令行上的参数优先",
    metavar="FILE",
)


def flags_of(options: Any) -> list[Flag]:
    """The flags of a dataclass or of an instance, in the order of the fields."""
    return [
        Flag(
            field.name,
            field.default,
            field.type in (bool, "bool"),
            is_list=str(field.type).startswith("tuple["),
            is_mapping=str(field.type).startswith("Mapping["),
            **field.metadata,
        )
        for field in dataclasses.fields(options)
        if "group" in field.metadata
    ]


def check_values(options: Any) -> None:
    """Check values that did not come from the command line against each flag's `type`.

    Raises:
        InputError: a value is out of range; the message names the flag.
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
    """Base class of a script's options: a frozen dataclass whose fields are flags."""

    script: ClassVar[str]
    description: ClassVar[str]
    chinese: ClassVar[str]  # the description in Chinese
    groups: ClassVar[tuple[Group, ...]]  # in the order of `--help`; GENERAL comes last
    hints: ClassVar[Mapping[str, str]]  # see `cpm_bee.hints`

    @classmethod
    def parser(cls) -> ArgumentParser:
        description = (cls.chinese if is_chinese() else cls.description).replace("`", "")
        parser = ArgumentParser(prog=cls.script, description=description, hints=cls.hints)
        sections: dict[Group, argparse._ActionsContainer] = {GENERAL: parser}
        for group in cls.groups:
            title = group.chinese if is_chinese() else group.title
            sections[group] = parser.add_argument_group(title)
        for flag in (*cls.flags(), CONFIG):
            flag.add_to(sections[flag.group])
        return parser

    @classmethod
    def flags(cls) -> list[Flag]:
        """Returns the flags by group, without --config, --debug and --lang."""
        order = [*cls.groups, GENERAL]
        return sorted(flags_of(cls), key=lambda flag: order.index(flag.group))

    @classmethod
    def parse(cls: type[Parsed], arguments: Sequence[str] | None = None) -> Parsed:
        """Read the command line, and the file of `--config`, which it overrides.

        Raises:
            InputError: flags, or settings in the file, are wrong.
        """
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        choose(last_value(arguments, "--lang"))
        parser, flags = cls.parser(), cls.flags()
        values: dict[str, Any] = {}
        path = last_value(arguments, "--config")
        if path is not None and not {"-h", "--help"} & set(arguments):
            values = config_file.read(path, flags, parser.hint, cls.script)
            parser.make_optional(values)
        given = vars(parser.parse_args(arguments))
        for flag in flags:
            if flag.name not in given or given[flag.name] is None:
                continue
            if flag.repeated:
                given[flag.name] = tuple(given[flag.name])
            if flag.words:
                given[flag.name] = flag.words(given[flag.name])
        values |= given
        return cls(**{flag.name: values[flag.name] for flag in flags})

    def as_config(
        self, notes: Sequence[str] = (), leave_out: Container[str] = (), **changes: Any
    ) -> str:
        """Returns the text of a `--config` file with these options.

        Args:
            notes: comments at its beginning.
            leave_out: fields that are not in it.
            changes: fields with other values.
        """
        groups: dict[Group, dict[str, Any]] = {}
        for flag in self.flags():
            if flag.name not in leave_out:
                value = changes.get(flag.name, getattr(self, flag.name))
                groups.setdefault(flag.group, {})[flag.name.replace("_", "-")] = value
        return config_file.text_of([(g.title, values) for g, values in groups.items()], notes)
