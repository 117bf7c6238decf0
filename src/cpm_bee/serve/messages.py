"""Chat messages and texts as records, and answers as text (docs/serving.md).

Everything a client sends is plain text: a literal `<` is escaped on the way in, and the answer is
unescaped on the way out. The last message is the input; a system message is the field `prompt`, as
in CPM-Bee's own examples; earlier turns are the field `history`, in order:

    {"prompt": "用一句话回答", "history": {"1": {"user": "你好", "assistant": "你好！"}},
     "input": "今天星期几？", "<ans>": ""}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpm_bee.records import ANSWER, Record, Tree, escape_texts
from cpm_bee.tokenizer import unescape

_ROLES = ("system", "developer", "user", "assistant")


class BadRequest(ValueError):
    """A request that cannot be answered; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def record_of_messages(messages: Sequence[dict[str, Any]]) -> Record:
    """Returns the record of a chat whose last message is the user's.

    Raises:
        BadRequest: a message has an unknown role or no text, or the last one is not the user's.
    """
    prompts: list[str] = []
    turns: list[dict[str, Tree]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in _ROLES:
            raise BadRequest(f"{where}: role must be one of {', '.join(_ROLES)}", where)
        text = _text(message.get("content"), f"{where}.content")
        if role in ("system", "developer"):
            prompts.append(text)
        elif not turns or role == "user" or "assistant" in turns[-1]:
            turns.append({role: text})
        else:
            turns[-1]["assistant"] = text
    if not turns or list(turns[-1]) != ["user"]:
        raise BadRequest("the last message must be the user's", "messages")
    record: Record = {}
    if prompts:
        record["prompt"] = "\n".join(prompts)
    if turns[:-1]:
        record["history"] = {str(i): turn for i, turn in enumerate(turns[:-1], start=1)}
    record["input"] = turns[-1]["user"]
    return plain_record({**record, ANSWER: ""})


def record_of_text(text: str) -> Record:
    """Returns the record of a text without any other field."""
    return plain_record({"input": text, ANSWER: ""})


def plain_record(record: Record) -> Record:
    """Returns a record of plain texts as the model reads it."""
    escaped: Record = escape_texts(record)
    return escaped


def plain_text(answer: Tree | None) -> Tree | None:
    """Returns an answer of the model as plain text."""
    if isinstance(answer, dict):
        return {key: plain_text(value) or "" for key, value in answer.items()}
    return None if answer is None else unescape(answer)


def _text(content: Any, where: str) -> str:
    """The text of a message: a string, or a list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise BadRequest("only parts of type text can be read", f"{where}[{i}]")
            parts.append(_text(part.get("text"), f"{where}[{i}].text"))
        return "".join(parts)
    raise BadRequest("expected a text", where)
