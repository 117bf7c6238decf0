"""Settings of a script in a YAML file (`--config FILE`), and the file that repeats a run.

A key is the name of a flag, with hyphens or underscores; a value is what would follow the flag:

    lr: 1e-4                    # as on the command line, though YAML 1.1 takes it for text
    use-delta: true             # a switch
    delta-targets: [w_0, w_1]   # or: w_0,w_1
    resume: true                # a flag that can be given without a value

Values are taken as text from the nodes of the file and converted by the flag itself, so a file
accepts what the command line does. PyYAML makes no objects: tags other than those of YAML's own
scalars are refused. It is imported only where a file is read or written: `--help` must be quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.paths import not_a_file

if TYPE_CHECKING:
    import yaml

_MAX_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "timestamp", "str", "value", "merge")
_ONLY_TYPED = ("config", "debug", "help", "lang")  # flags that make no sense in a file
_OF_A_MODEL = "dim_model"  # a key of model configs, which people know as "the config"


class Setting(Protocol):
    """What this module needs to know of a flag: see `options.Flag`."""

    @property
    def name(self) -> str: ...
    @property
    def default(self) -> Any: ...
    @property
    def is_switch(self) -> bool: ...
    @property
    def is_list(self) -> bool: ...
    @property
    def is_mapping(self) -> bool: ...
    @property
    def type(self) -> Callable[[str], Any] | None: ...
    @property
    def choices(self) -> Sequence[str] | None: ...
    @property
    def bare(self) -> str | None: ...
    @property
    def repeated(self) -> bool: ...
    @property
    def words(self) -> Callable[[Sequence[str]], Any] | None: ...


class _WrongValue(Exception):
    """A value that a flag does not take; the text says why."""


def read(
    path: str, settings: Sequence[Setting], hint: Callable[[str], str | None], script: str
) -> dict[str, Any]:
    """Returns the values in a file, by the names of fields.

    Args:
        settings: the flags of the script.
        hint: returns what an unknown flag may mean.
        script: its name, for messages.

    Raises:
        InputError: lists all that is wrong, each with file and line.
    """
    known = {setting.name: setting for setting in settings}
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems = Problems()
    pairs = list(_pairs(path))
    for key, node in pairs:
        where = f"{path}:{key.start_mark.line + 1}"
        text = str(key.value) if _is_scalar(key) else ""
        name = text.strip().replace("-", "_")
        if name in lines:
            problems.add(where, f"{text} is also in line {lines[name]}; keep one of them")
        elif name in known:
            try:
                values[name] = _value(known[name], node)
            except _WrongValue as error:
                problems.add(where, f"{text}: {error}")
        else:
            problems.add(where, _unknown(key, text, hint))
        lines.setdefault(name, key.start_mark.line + 1)
    is_model = _OF_A_MODEL in lines and "model_config" in known
    problems.raise_if_any(
        f"--config {path}: these settings cannot be used:",
        f"this looks like the config of a model, which is given with --model-config {path}"
        if is_model
        else f"see: python {script} --help",
    )
    return values


def _unknown(key: yaml.Node, text: str, hint: Callable[[str], str | None]) -> str:
    if not _is_scalar(key):
        return "the name of a flag is expected before the colon"
    if text.strip("- ") in _ONLY_TYPED:
        return f"{text}: --{text.strip('- ')} is given on the command line"
    meant = hint("--" + text.strip().lstrip("-"))
    if meant is None:
        return f"unknown setting {shown(text)}"
    # As it is written in a file: `--quantize nf4` is `quantize: nf4`.
    written = [flag.removeprefix("--").replace(" ", ": ", 1) for flag in meant.split(" or ")]
    return f"unknown setting {shown(text)} (did you mean {' or '.join(written)}?)"


def _pairs(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a file, which have their lines; no object is made of them."""
    import yaml

    where = f"--config {path}"
    if reason := not_a_file(path, "config file"):
        raise InputError(f"{where}: {reason}")
    content = Path(path).read_bytes()
    if len(content) > _MAX_BYTES:
        raise InputError(f"{where}: has {len(content):,} bytes; a file of settings has far fewer")
    try:
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise InputError(f"--config {path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{where}: expected lines of the form FLAG: VALUE, such as lr: 1e-4")
    return list(root.value)


def _is_scalar(node: yaml.Node) -> bool:
    import yaml

    return isinstance(node, yaml.ScalarNode) and _kind(node) in _SCALARS


def _kind(node: yaml.Node) -> str:
    """The kind that YAML gives a scalar, such as `bool`; text in quotes is `str`."""
    return str(node.tag).removeprefix(_TAG)


def _value(setting: Setting, node: yaml.Node) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return _of_list(setting, [_item(item) for item in node.value])
    if isinstance(node, yaml.MappingNode):
        if not setting.is_mapping:
            raise _WrongValue("is a mapping; expected one value")
        pairs = [(_item(key), _item(value)) for key, value in node.value]
        if any(mark in text for pair in pairs for text in pair for mark in ",="):
            raise _WrongValue("a comma or = in a name cannot be expressed")
        return _converted(setting, ",".join(f"{key}={value}" for key, value in pairs))
    if not _is_scalar(node):
        raise _WrongValue(f"the tag {shown(node.tag)} is not allowed")
    return _of_scalar(setting, _kind(node), str(node.value))


def from_json(setting: Setting, value: Any) -> Any:
    """Returns the value of a flag from a JSON value, which means what it means in a file.

    Raises:
        InputError: it is not one that the flag takes.
    """
    try:
        if isinstance(value, list):
            return _of_list(setting, [str(item) for item in value])
        if isinstance(value, dict):
            raise _WrongValue("is a mapping; expected one value")
        kind = "null" if value is None else "bool" if isinstance(value, bool) else "str"
        return _of_scalar(setting, kind, str(value))
    except _WrongValue as error:
        raise InputError(str(error)) from None


def _of_scalar(setting: Setting, kind: str, text: str) -> Any:
    if kind == "null":
        if setting.default is None:
            return None
        raise _WrongValue("has no value; leave out the line for the default")
    if kind == "bool" and (setting.is_switch or setting.bare or setting.words):
        return _of_bool(setting, text.lower() in ("true", "yes", "on"))
    if setting.is_switch:
        raise _WrongValue(f"{shown(text)} is neither true nor false")
    if kind == "bool" and text.lower() in ("true", "false"):  # `no` and `on` may be names
        raise _WrongValue(f"is {text}; expected a value, or text in quotes")
    if setting.words is not None:
        return _of_list(setting, text.split())
    value = _converted(setting, text)
    return (value,) if setting.repeated else value


def _of_bool(setting: Setting, value: bool) -> Any:
    """The value of a flag that can stand alone: true is the flag, false is none."""
    if setting.is_switch:
        return value
    if not value:
        return setting.default
    return _of_list(setting, []) if setting.words is not None else setting.bare


def _item(node: yaml.Node) -> str:
    if not _is_scalar(node) or _kind(node) == "null":
        raise _WrongValue("expected single values in it")
    return str(node.value)


def _of_list(setting: Setting, items: list[str]) -> Any:
    if setting.words is not None:
        try:
            return setting.words(items)
        except InputError as error:
            raise _WrongValue(str(error)) from None
    if setting.repeated:
        if not items:
            raise _WrongValue("is an empty list")
        return tuple(_converted(setting, item) for item in items)
    if not setting.is_list:
        raise _WrongValue("is a list; expected one value")
    if any("," in item or not item.strip() for item in items):
        raise _WrongValue("an item is empty or has a comma")
    return _converted(setting, ",".join(items))


def _converted(setting: Setting, text: str) -> Any:
    try:
        value = text if setting.type is None else setting.type(text)
    except argparse.ArgumentTypeError as error:
        raise _WrongValue(str(error)) from None
    except InputError as error:
        raise _WrongValue(str(error)) from None
    except ValueError:
        raise _WrongValue(f"{shown(text)} is not valid here") from None
    if setting.choices is not None and value not in setting.choices:
        raise _WrongValue(f"{shown(value)} is none of {', '.join(setting.choices)}")
    return value


def text_of(values: Sequence[tuple[str, dict[str, Any]]], notes: Sequence[str]) -> str:
    """Returns the file of some settings, which `read` reads to the same values.

    Args:
        values: the settings by flag, without the hyphens before it, in groups with titles. A value
            is text, a number, a truth value, a tuple of texts, or None for a flag not given.
        notes: comments at its beginning.
    """
    return "\n".join([*(f"# {note}" for note in notes), *_lines(values)]) + "\n"


def _lines(values: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    import yaml

    for title, settings in values:
        yield f"\n# {title}"
        for name, value in settings.items():
            is_list = isinstance(value, tuple)
            plain = {name: list(value) if is_list else value}
            # None: a list is written in one line, and only a list is.
            flow = None if is_list else False
            texts = [text for text in (value if is_list else [value]) if isinstance(text, str)]
            # YAML takes these for ends of lines, except in double quotes, where they are escaped.
            style = '"' if set("\x85\u2028\u2029") & set("".join(texts)) else None
            dumped = yaml.safe_dump(
                plain,
                allow_unicode=True,
                width=1 << 20,
                default_flow_style=flow,
                default_style=style,
            )
            yield dumped.rstrip("\n")
