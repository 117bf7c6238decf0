"""Codes of the errors that a user can cause, and what is printed, in Chinese.

Texts are written in English where they arise: `InputError(f"{path}: holds no records")`. The
tables of `messages/*.json` have a pattern for each, with named placeholders and its translation:

    ["holds no records", "没有任何记录"]
    ["is a link to {target}, which does not exist", "是指向 {target} 的链接，而目标不存在"]

A text is read line by line. What stands before a colon (a path, a line, a flag) is no part of a
pattern. Of several patterns that fit, the one with the most literal characters counts. The value of
a placeholder whose name begins with `reason`, `error` or `kind` is read in the same way, all others
are values and stay as they are. Texts that nobody has translated stay English.

Tables are loaded, and patterns compiled, when the first text is shown. `tests/test_error_codes.py`
finds the texts in the source and says which are missing here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).parent / "messages"
_NO_CODE = ("parts", "lines", "doctor")  # tables of texts that belong to others, or are no errors
_PLACES = "places"  # in the table of parts: what stands before a colon
_PLACEHOLDER = re.compile(r"\{([a-z]\w*)\}")
_READ_TOO = ("reason", "error", "kind")
_MOST_CODES = 4  # in the first line of a message


class Words(NamedTuple):
    """A text in both languages."""

    en: str
    zh: str


class Entry(NamedTuple):
    """What a code means."""

    code: str
    title: Words
    cause: Words
    fix: Words
    example: Words
    messages: tuple[Words, ...]
    general: bool  # of use only where a message has no other code
    topic: str  # the table that it is in


class Pattern:
    """A text with placeholders, and its translation.

    Attributes:
        code: the code of its entry; None for a text that has none of its own.
        names: the placeholders, in their order.
        weight: the number of literal characters.
    """

    def __init__(self, words: Words, code: str | None) -> None:
        self.words, self.code = words, code
        parts = _PLACEHOLDER.split(words.en)
        self._literals, self.names = parts[::2], parts[1::2]
        self.weight = sum(map(len, self._literals))
        self._needed = max(self._literals, key=len)

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        seen: set[str] = set()
        text = re.escape(self._literals[0])
        for name, literal in zip(self.names, self._literals[1:], strict=True):
            any_value = ".*?"
            if text == "" and not name.startswith(_READ_TOO):
                any_value = "(?:(?!: ).)*?(?<!:)"  # what stands before a colon is no part of it
            text += f"(?P={name})" if name in seen else f"(?P<{name}>{any_value})"
            text += re.escape(literal)
            seen.add(name)
        return re.compile(text)

    def match(self, text: str) -> dict[str, str] | None:
        """The values of the placeholders, if the whole text has this form."""
        if self._needed not in text:
            return None
        found = self._regex.fullmatch(text)
        return None if found is None else found.groupdict()

    def chinese(self, values: dict[str, str]) -> str:
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.words.zh)

    def english(self, values: dict[str, str]) -> str:
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.words.en)


@functools.cache
def _tables() -> dict[str, dict[str, object]]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(TABLES.glob("*.json"))
    }


@functools.cache
def entries() -> dict[str, Entry]:
    """All codes in their order."""
    found = {}
    for name, table in _tables().items():
        if name not in _NO_CODE:
            for code, fields in table.items():
                assert isinstance(fields, dict)
                found[code] = Entry(
                    code,
                    Words(*fields["title"]),
                    Words(*fields["cause"]),
                    Words(*fields["fix"]),
                    Words(*fields["example"]),
                    tuple(Words(*pair) for pair in fields["messages"]),
                    fields.get("general", False),
                    name,
                )
    return dict(sorted(found.items()))


@functools.cache
def patterns(*, lines: bool = False) -> tuple[Pattern, ...]:
    """All patterns of errors, those with the most literal characters first.

    Args:
        lines: also those of other lines, which are short and would fit some errors.
    """
    found = [Pattern(words, e.code) for e in entries().values() for words in e.messages]
    for name in _NO_CODE if lines else ("parts",):
        for section, pairs in _tables()[name].items():
            assert isinstance(pairs, list)
            if section != _PLACES:
                found += [Pattern(Words(*pair), None) for pair in pairs]
    return tuple(sorted(found, key=lambda pattern: -pattern.weight))


@functools.cache
def places() -> tuple[Pattern, ...]:
    """Patterns of what stands before a colon."""
    pairs = _tables()["parts"][_PLACES]
    assert isinstance(pairs, list)
    return tuple(Pattern(Words(*pair), None) for pair in pairs)


class Reading(NamedTuple):
    """What a line says: the codes of its errors, and the line in Chinese."""

    codes: tuple[str, ...]
    chinese: str


def matches(text: str, *, lines: bool = False) -> Iterator[tuple[Pattern, dict[str, str]]]:
    """All patterns that a text has the form of, without what stands before a colon."""
    for pattern in patterns(lines=lines):
        if (values := pattern.match(text)) is not None:
            yield pattern, values


def read_line(text: str, *, lines: bool = False) -> Reading | None:
    """Returns what a line says; None if no part of it is known."""
    return _whole(text, lines) or _after_a_colon(text, lines) or _joined(text, lines)


def _whole(text: str, lines: bool) -> Reading | None:
    first = next(matches(text, lines=lines), None)
    if first is None:
        return None
    pattern, values = first
    codes: tuple[str, ...] = (pattern.code,) if pattern.code else ()
    for name, value in values.items():
        if name.startswith(_READ_TOO) and (inner := read_line(value, lines=lines)):
            values[name] = inner.chinese
            codes = codes or inner.codes
    return Reading(codes, pattern.chinese(values))


def _after_a_colon(text: str, lines: bool) -> Reading | None:
    begin = text.find(": ")
    while begin >= 0:
        if found := _whole(text[begin + 2 :], lines):
            where = map(_place, text[:begin].split(": "))
            return Reading(found.codes, ": ".join([*where, found.chinese]))
        begin = text.find(": ", begin + 2)
    return None


def _place(text: str) -> str:
    for pattern in places():
        if (values := pattern.match(text)) is not None:
            return pattern.chinese(values)
    return text


def _joined(text: str, lines: bool) -> Reading | None:
    """Reasons that are joined by semicolons: of one record, of one flag."""
    for begin in (match.start() for match in re.finditer("; ", text)):
        one = _whole(text[:begin], lines) or _after_a_colon(text[:begin], lines)
        rest = read_line(text[begin + 2 :], lines=lines)
        if one and rest:
            return Reading(one.codes + rest.codes, f"{one.chinese}；{rest.chinese}")
    return None


def codes_of(message: str) -> list[str]:
    """The codes of a message's errors, each once, in their order."""
    codes: dict[str, None] = {}
    for line in message.splitlines():
        if found := read_line(line.strip()):
            codes |= dict.fromkeys(found.codes)
    special = [code for code in codes if not entries()[code].general]
    return special or list(codes)


def code_of(message: str) -> str | None:
    """The code of a message's first error; None if it is not known."""
    return next(iter(codes_of(message)), None)


def codes_of_chinese(message: str) -> list[str]:
    """As `codes_of`, for a message that has been translated; all codes with that text."""
    found: dict[str | None, None] = {}
    for line in filter(None, map(str.strip, message.splitlines())):
        for begin in [0, *(match.end() for match in re.finditer(": ", line))]:
            fit = [p for p in _chinese_patterns() if p.match(line[begin:]) is not None]
            if fit:
                found |= dict.fromkeys(p.code for p in fit if p.weight == fit[0].weight)
                break
    return [code for code in found if code]


@functools.cache
def _chinese_patterns() -> tuple[Pattern, ...]:
    found = [Pattern(Words(w.zh, w.en), e.code) for e in entries().values() for w in e.messages]
    return tuple(sorted(found, key=lambda pattern: -pattern.weight))


def translate(message: str, *, lines: bool = False) -> str:
    """A message in Chinese; lines that are not in the tables stay as they are.

    Args:
        lines: it is no error, but a result, a hint or a label.
    """
    return "\n".join(_translated(line, lines) for line in message.split("\n"))


def _translated(line: str, lines: bool) -> str:
    text = line.strip()
    found = read_line(text, lines=lines) if text else None
    if found is None:
        return line
    return line[: len(line) - len(line.lstrip())] + found.chinese


def with_code(message: str, language: str) -> str:
    """A message as it is printed: in a language, with its codes at the end of the first line."""
    codes = codes_of(message)
    first, newline, rest = (translate(message) if language == "zh" else message).partition("\n")
    if codes:
        more = codes[:_MOST_CODES]
        ends = (
            f"（说明：{'、'.join(more)}）" if language == "zh" else f" (explain: {', '.join(more)})"
        )
        first += ends
    return first + newline + rest
