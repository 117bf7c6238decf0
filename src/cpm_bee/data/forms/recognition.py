"""Which form the rows of a file have, by the first of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from cpm_bee.data.forms.choices import is_marked, lettered
from cpm_bee.data.forms.dialogue import is_messages
from cpm_bee.data.forms.names import NAMES, Columns, normal
from cpm_bee.data.forms.rows import json_kind
from cpm_bee.errors import InputError
from cpm_bee.records import ANSWER

RECORDS, ALPACA, DIALOGUE = "records", "alpaca", "dialogue"
QUESTION_ANSWER, CLASSIFICATION, CHOICES = "question-answer", "classification", "choices"
# The roles that a form needs, in the order in which forms are tried.
NEEDED = {
    DIALOGUE: ("messages",),
    CHOICES: ("choices",),
    CLASSIFICATION: ("text", "label"),
    QUESTION_ANSWER: ("question", "answer"),
    ALPACA: ("instruction", "output"),
}
# The roles of a form, each of which takes another key.
USED = {
    DIALOGUE: ("messages", "system", "tools"),
    CHOICES: ("choices", "question", "answer", "context"),
    CLASSIFICATION: ("label", "text", "text2"),
    QUESTION_ANSWER: ("question", "answer", "context"),
    ALPACA: ("instruction", "input", "output", "history", "system", "tools"),
}
_WHAT = {
    RECORDS: f'an object with "{ANSWER}"',
    ALPACA: '{"instruction": "...", "input": "...", "output": "..."}',
    DIALOGUE: '{"messages": [{"role": "user", "content": "..."}, ...]} or '
    '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    CHOICES: '{"question": "...", "choices": ["...", "..."], "answer": 0}',
    CLASSIFICATION: '{"text": "...", "label": "..."}',
    QUESTION_ANSWER: '{"question": "...", "answer": "..."}',
}


def recognise(row: Any, columns: Columns) -> str | None:
    """The form of a row; None if it is none of them."""
    if not isinstance(row, dict):
        return None
    if ANSWER in row:
        return RECORDS
    for form, needed in NEEDED.items():  # what the user has named
        if set(needed) <= set(columns.given) and set(needed) <= set(columns.find(row, USED[form])):
            return form
    found = columns.find(row, USED[DIALOGUE])
    if "messages" in found and is_messages(row[found["messages"]]):
        return DIALOGUE
    if has_options(row, columns):
        return CHOICES
    alpaca = columns.find(row, USED[ALPACA])
    is_alpaca = "output" in alpaca and ("instruction" in alpaca or "input" in alpaca)
    if is_alpaca and normal(alpaca.get("instruction", "")) == "instruction":
        return ALPACA
    for form in (CLASSIFICATION, QUESTION_ANSWER):
        if set(NEEDED[form]) <= set(columns.find(row, USED[form])):
            return form
    return ALPACA if is_alpaca else None


def has_options(row: Mapping[str, Any], columns: Columns) -> bool:
    """Whether a row has a list of options, options A, B, ..., or a question of the tutorial."""
    found = columns.find(row, USED[CHOICES])
    if "context" in found and is_marked(row[found["context"]]):
        return True
    if "choices" in found:
        return True
    return bool(lettered(row)) and "question" in found


def unknown_form(where: str, row: Any, columns: Columns) -> InputError:
    """The error for a row of no known form: what it has, and which forms are near."""
    if not isinstance(row, dict):
        seen = f"its first record is {json_kind(row)}, expected an object"
    else:
        parts = [f"{key!r} ({json_kind(value)})" for key, value in list(row.items())[:12]]
        more = f" and {len(row) - 12} more" if len(row) > 12 else ""
        seen = f"its first record has {', '.join(parts)}{more}" if row else "it has no keys"
    near = "\n".join(f"  {line}" for line in _near_forms(row, columns))
    return InputError(
        f"{where}: the data is of no known form: {seen}\nnear forms:\n{near}\n"
        "name the columns with --columns ROLE=COLUMN,..., or change rows with --transform"
    )


def _near_forms(row: Any, columns: Columns) -> list[str]:
    """A line for each form of which a row has something, the nearest first; else for all."""
    found: list[tuple[int, str]] = []
    keys = [normal(key) for key in row] if isinstance(row, dict) else []
    for form, needed in NEEDED.items():
        has = columns.find(row, USED[form]) if keys else {}
        parts = [f"{role} is {has[role]!r}" for role in needed if role in has]
        score = 2 * len(parts) + len(has)
        for role in needed:
            if role not in has:
                similar = [
                    k for name in NAMES[role] for k in difflib.get_close_matches(name, keys, 1)
                ]
                hint = (
                    f" ({similar[0]!r} is similar: --columns {role}={similar[0]})"
                    if similar
                    else ""
                )
                parts.append(f"there is no {role}{hint}")
                score += 2 * bool(similar)
        found.append((score, f"{form}: {'; '.join(parts)}; expected {_WHAT[form]}"))
    found.sort(key=lambda pair: -pair[0])
    near = [line for score, line in found if score][:3]
    return near or [f"{form}: {what}" for form, what in _WHAT.items()]


def expanded(row: Any) -> list[Any]:
    """The questions of a row that has several: of SQuAD's form (CMRC, DRCD), or of CLUE's C3."""
    if isinstance(row, list) and len(row) >= 2 and all(isinstance(part, list) for part in row[:2]):
        texts, questions = row[:2]
        if all(isinstance(t, str) for t in texts) and all(isinstance(q, dict) for q in questions):
            return [{"context": "\n".join(texts), **question} for question in questions]
    if isinstance(row, dict) and isinstance(row.get("paragraphs"), list):
        paragraphs = [p for p in row["paragraphs"] if isinstance(p, dict)]
    elif isinstance(row, dict) and isinstance(row.get("qas"), list):
        paragraphs = [row]
    else:
        return [row]
    return [
        {"context": paragraph.get("context"), **question}
        for paragraph in paragraphs
        for question in paragraph.get("qas", ())
        if isinstance(question, dict)
    ]
