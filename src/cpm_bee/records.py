"""A record: a nested dictionary of strings with the answer under `<ans>`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from cpm_bee.errors import InputError
from cpm_bee.tokenizer import MarkupError, split_markup

ANSWER = "<ans>"
Tree: TypeAlias = "str | dict[str, Tree]"
Record: TypeAlias = dict[str, Tree]

# Deeper trees than any real one: walking recurses, and a bin record's unpickling does too.
MAX_NESTING = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_line(line: str) -> tuple[Any, str | None]:
    """Parse one line of JSON: (value, None), or (None, the reason why it is not JSON)."""
    try:
        return json.loads(line), None
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return None, "not valid JSON (nested too deeply)"
    except ValueError as error:  # e.g. a number of more digits than Python reads
        return None, f"not valid JSON ({error})"


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a UTF-8 text file with their numbers from 1.

    A byte order mark at the beginning and carriage returns are dropped. Raises `InputError`, with
    file:line, where the text is not UTF-8 or the file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line, reason = decode_line(raw, is_first=number == 1)
            if reason:
                raise InputError(f"{path}:{number}: {reason}")
            if line:
                yield number, line


def decode_line(raw: bytes, *, is_first: bool) -> tuple[str, str | None]:
    """A line's text ("" where it is blank) and None, or "" and the reason why it is no text.

    `is_first`: the first line of a file may begin with a byte order mark.
    """
    try:
        line = raw.decode("utf-8-sig" if is_first else "utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text ({error.reason} at byte {error.start})"
    return ("" if line.isspace() else line), None


def validate(record: Any) -> list[str]:
    """Everything that keeps a value from being a record; empty if it is one.

    Checks the shape (dictionary of dictionaries and strings), that `<ans>` is there, and that
    special tokens are well formed (docs/format.md §1, §2). Whether the vocabulary has their names
    is not checked here.
    """
    if _is_valid(record):
        return []
    return _problems(record)


def _problems(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return [f"a record is a JSON object, this is {_kind(record)}"]
    problems = list(_tree_problems(record, "", 1))
    if ANSWER not in record:
        problems.append(f'there is no "{ANSWER}" (use "" where the answer is not known)')
    elif not _has_leaf(record[ANSWER]):
        problems.append(f'"{ANSWER}" holds no text')
    return problems


def _is_valid(record: Any) -> bool:
    """Quickly whether there are no problems; false where that is not clear."""
    texts: list[str] = []
    if not isinstance(record, dict) or not _collect(record, texts, 1):
        return False
    if ANSWER not in record or not _has_leaf(record[ANSWER]):
        return False
    try:
        "".join(texts).encode()  # refuses surrogates
    except (TypeError, UnicodeEncodeError):
        return False
    return all("<" not in text or _is_well_formed(text) for text in texts)


def _collect(node: dict, texts: list[str], depth: int) -> bool:
    """Add the keys and leaves, whatever they are; false where the tree is too deep."""
    for key, value in node.items():
        texts.append(key)
        if value.__class__ is not dict:
            texts.append(value)
        elif depth == MAX_NESTING or not _collect(value, texts, depth + 1):
            return False
    return True


@lru_cache(maxsize=256)
def _is_well_formed(text: str) -> bool:
    return not list(_text_problems(text, ""))


def _tree_problems(node: dict, path: str, depth: int) -> Iterator[str]:
    for key, value in node.items():
        where = f"{path}/{key}"
        yield from _text_problems(key, f"key {where}")
        if isinstance(value, str):
            yield from _text_problems(value, f"value of {where}")
        elif not isinstance(value, dict):
            yield f"value of {where}: expected text or an object, this is {_kind(value)}"
        elif depth == MAX_NESTING:
            yield f"value of {where}: nested more than {MAX_NESTING} deep"
        else:
            yield from _tree_problems(value, where, depth + 1)


def _has_leaf(node: Any) -> bool:
    # Anything but a dictionary is either text or a problem of its own.
    return any(map(_has_leaf, node.values())) if isinstance(node, dict) else True


def _text_problems(text: Any, where: str) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{where}: expected text, this is {_kind(text)}"
        return
    if "<" in text:
        try:
            for _ in split_markup(text):
                pass
        except MarkupError as error:
            yield f"{where}: {error}"
    if _SURROGATE.search(text):
        yield f"{where}: holds half of a surrogate pair, which is not text"


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
