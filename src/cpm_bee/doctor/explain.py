"""`doctor.py explain`: what an error code or a pasted message means, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cpm_bee import error_codes, language
from cpm_bee.cli import ArgumentParser, last_value
from cpm_bee.error_codes import Entry
from cpm_bee.errors import InputError
from cpm_bee.language import CHINESE, said, width, wrapped

_COLUMNS = 88
_CODE = re.compile(r"E\d{3}", re.ASCII)
_LABELS = {
    "en": ("cause", "fix", "example", "messages"),
    "zh": ("原因", "解决办法", "示例", "消息"),
}


def explain(arguments: Sequence[str]) -> str:
    """Returns the text for the command line after `doctor.py explain`.

    Raises:
        InputError: there is no such code, or no message has such a text.
    """
    language.choose(last_value(arguments, "--lang"))
    words = _parser().parse_args(arguments).what
    if not words:
        return _list()
    return "\n\n".join(_shown(entry) for entry in find(" ".join(words)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="doctor.py explain",
        description=said("Explain an error: its cause, what helps, and an example."),
    )
    text = said("codes such as E201, or the text of an error in quotes; all codes without it")
    parser.add_argument("what", nargs="*", metavar="CODE", help=text)
    return parser


def find(text: str) -> list[Entry]:
    """The entries of codes that are named, or of a message in either language.

    Raises:
        InputError: there is none.
    """
    entries = error_codes.entries()
    if numbers := re.fullmatch(r"(?:[Ee]?\d{1,3}[\s,、]*)+", text.strip(), re.ASCII):
        codes = [f"E{int(number):03}" for number in re.findall(r"\d+", numbers[0])]
    else:
        codes = _CODE.findall(text) or error_codes.codes_of(_unlabelled(text))
        codes = codes or error_codes.codes_of_chinese(_unlabelled(text))
        if not codes:
            raise InputError(
                f"{text[:80]!r}: no message has this text; doctor.py explain lists all codes"
            )
    for code in codes:
        if code not in entries:
            raise InputError(f"there is no code {code}; near it: {', '.join(_near(code, entries))}")
    return [entries[code] for code in dict.fromkeys(codes)]


def _near(code: str, codes: Iterable[str]) -> list[str]:
    return sorted(sorted(codes, key=lambda other: abs(int(other[1:]) - int(code[1:])))[:3])


def _unlabelled(text: str) -> str:
    """A pasted message without what stands before and after it on the terminal."""
    text = re.sub(r"^\s*(error|错误): ?(rank \d+ on \S+: )?", "", text)
    return re.sub(r" ?[(（](explain: |说明：)[^)）]*[)）]", "", text)


def _list() -> str:
    lines = []
    for entry in error_codes.entries().values():
        title = entry.title.zh if language.current() == CHINESE else entry.title.en
        lines.append(f"{entry.code}  {title}")
    return "\n".join([*lines, "", said("python doctor.py explain CODE says more")])


def _shown(entry: Entry) -> str:
    chosen = language.current()
    labels = _LABELS[chosen]
    index = int(chosen == CHINESE)
    lines = [f"{entry.code}  {entry.title[index]}"]
    indent = max(map(width, labels)) + 2
    messages = [words[index] for words in entry.messages]
    for label, text in zip(labels, (entry.cause, entry.fix, entry.example), strict=False):
        lines += _paragraph(label, [text[index]], indent, keep=text is entry.example)
    lines += _paragraph(labels[-1], messages, indent, keep=True)
    return "\n".join(lines)


def _paragraph(label: str, texts: Sequence[str], indent: int, *, keep: bool) -> list[str]:
    """A label, and texts beside it; those that are to be copied are not wrapped."""
    found = []
    for text in texts:
        found += text.split("\n") if keep else wrapped(text, _COLUMNS - indent)
    first = label + " " * (indent - width(label))
    return [(first if i == 0 else " " * indent) + line for i, line in enumerate(found)]
