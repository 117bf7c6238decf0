"""Questions with options, in the forms of CCPM, CLUE (C3), C-Eval, ARC and others -> records."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from cpm_bee.data.forms.rows import json_kind
from cpm_bee.data.forms.values import BadRow, Texts, structure
from cpm_bee.records import ANSWER

LETTERS = string.ascii_uppercase
# The tutorial's form of CCPM, all in one text: [翻译]TEXT[0]OPTION[1]OPTION[答案]
_BEGIN, _END = "[翻译]", "[答案]"
CCPM_QUESTION = "这段话形容了哪句诗的意境？"


def is_marked(value: Any) -> bool:
    """Whether a text is a question of the tutorial, with its options in it."""
    return isinstance(value, str) and value.strip().startswith(_BEGIN)


def split_marked(text: str) -> tuple[str, list[str]]:
    """The text and the options of a question of the tutorial.

    From the first `[0]` on, each number in brackets must be the next one: a marker that is wrong
    would move text from one option to another.

    Raises:
        BadRow: the markers are not as they should be.
    """
    text = text.strip()
    if not text.endswith(_END):
        raise BadRow(f"does not end with {_END}")
    body = text[len(_BEGIN) : -len(_END)]
    if _BEGIN in body or _END in body:
        raise BadRow(f"has {_BEGIN} or {_END} more than once")
    begin = body.find("[0]")
    if begin < 0:
        raise BadRow("has no [0]")
    parts = re.split(r"\[(0|[1-9]|1[0-9]|2[0-6])\]", body[begin:])[1:]
    numbers, options = list(map(int, parts[::2])), parts[1::2]
    if numbers != list(range(len(numbers))):
        wrong = next(i for i, number in enumerate(numbers) if number != i)
        raise BadRow(f"has [{numbers[wrong]}] where [{wrong}] or {_END} is expected")
    return body[:begin], options


def lettered(row: Mapping[str, Any]) -> dict[str, str]:
    """The keys A, B, C, ... of a row, by letter; empty if there are not at least two."""
    keys = {str(key).strip().upper().removeprefix("OPTION").strip("_ "): key for key in row}
    found = {}
    for letter in LETTERS:
        if letter not in keys:
            break
        found[letter] = keys[letter]
    return found if len(found) >= 2 else {}


def options_of(value: Any, texts: Texts) -> dict[str, str]:
    """The options of a row by what names them: their letters or labels, else A, B, C, ...

    Raises:
        BadRow: they are not a list or object of two or more texts.
    """
    value = structure(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC: label and text
        labels, value = value.get("label"), value["text"]
        if isinstance(labels, list) and len(labels) == len(value) == len(set(map(str, labels))):
            value = dict(zip(map(str, labels), value, strict=True))
    if isinstance(value, list):
        names: list[str] = [LETTERS[i] if i < len(LETTERS) else str(i) for i in range(len(value))]
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, dict) or not value:
        raise BadRow(f"the options are {json_kind(value)}, expected a list of texts")
    found = {str(name): texts.of(option, f"option {name}") for name, option in value.items()}
    if len(found) < 2:
        raise BadRow("has only one option")
    for name, option in found.items():
        if not option.strip():
            raise BadRow(f"option {name} is empty")
    return found


def answer_number(answer: Any, options: Mapping[str, str], answer_as: str) -> int | None:
    """The number of the option that an answer names; None for no answer.

    Args:
        answer: a number from 0, the name (letter) of an option, or its text.
        options: the texts by name.
        answer_as: "auto", "number", "number-from-1", "letter" or "text".

    Raises:
        BadRow: it names no option, or two of them.
    """
    if answer is None or answer == "":
        return None
    names, options_texts = list(options), list(options.values())
    given = str(answer).strip()
    found: dict[str, int] = {}
    if not isinstance(answer, (bool, float)) and re.fullmatch("-?[0-9]{1,9}", given):
        found["number"], found["number-from-1"] = int(given), int(given) - 1
    if isinstance(answer, str):
        by_letter = {name.upper(): i for i, name in reversed(list(enumerate(names)))}
        if (bare := given.strip("()（）.．、 ").upper()) in by_letter:
            found["letter"] = by_letter[bare]
        if given in (stripped := [text.strip() for text in options_texts]):
            found["text"] = stripped.index(given)
    if answer_as == "auto":
        candidates = {kind: i for kind, i in found.items() if kind != "number-from-1"}
        # Labels that are numbers ("1" to "4") are names, and win over the count from 0.
        if "letter" in candidates:
            candidates.pop("number", None)
        if len(set(candidates.values())) > 1:
            kinds = " or the ".join(f"{k} of option {i}" for k, i in candidates.items())
            raise BadRow(f"the answer {given!r} could be the {kinds}: say --answer-as")
        number = next(iter(candidates.values()), None)
    else:
        number = found.get(answer_as)
    if number is None:
        raise BadRow(f"the answer {given[:40]!r} is none of the {len(names)} options")
    if not 0 <= number < len(names):
        raise BadRow(f"the answer is {given}, there are {len(names)} options")
    return number


def choice_record(
    text: str, question: str, options: list[str], answer: int | None
) -> dict[str, Any]:
    """The record of a question with options; without a text or a question it lacks that field."""
    record: dict[str, Any] = {"input": text} if text else {}
    record["options"] = {f"<option_{i}>": option for i, option in enumerate(options)}
    if question:
        record["question"] = question
    return {**record, ANSWER: "" if answer is None else f"<option_{answer}>"}
