"""Dialogues -> records (docs/format.md §1).

A reply becomes a record. What precedes it is context: the messages before the last one under
`history`, numbered from 1, and the last one under `input` if it is the user's:

    {"system": "...", "history": {"1": {"user": "..."}, "2": {"assistant": "..."}},
     "input": "...", "<ans>": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cpm_bee.data.forms.rows import json_kind
from cpm_bee.data.forms.values import BadRow, Texts, structure
from cpm_bee.records import ANSWER

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CALL, OBSERVATION = "function_call", "observation"
# Roles of OpenAI, ShareGPT, LLaMA-Factory and ms-swift.
_ROLES = {
    USER: (USER, "human", "prompter", "用户"),
    ASSISTANT: (ASSISTANT, "gpt", "bot", "chatgpt", "chatbot", "model", "助手"),
    SYSTEM: (SYSTEM, "developer"),
    CALL: (CALL, "tool_call"),
    OBSERVATION: (
        OBSERVATION,
        "observations",
        "tool",
        "function",
        "tool_response",
        "function_response",
    ),
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
# The tags of dataset_info.json.
TAGS = {
    "user_tag": USER,
    "assistant_tag": ASSISTANT,
    "system_tag": SYSTEM,
    "function_tag": CALL,
    "observation_tag": OBSERVATION,
}


class Message(NamedTuple):
    """A message; `is_learnt` is false for a reply that the data excludes from training."""

    role: str
    text: str
    is_learnt: bool = True


def is_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages, or of pairs of messages."""
    value = structure(value)
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def messages_of(value: Any, texts: Texts, tags: Mapping[str, str] | None = None) -> list[Message]:
    """The messages of a row.

    Args:
        tags: of dataset_info.json: `role_tag`, `content_tag`, and what the roles are called.

    Raises:
        BadRow: they are not messages of known roles.
    """
    tags = tags or {}
    roles = {name: role for role, names in _ROLES.items() for name in names}
    roles |= {tags[tag]: role for tag, role in TAGS.items() if tag in tags}
    value = structure(value)
    if not isinstance(value, list) or not value:
        raise BadRow(f"the messages are {json_kind(value)}, expected a list of messages")
    found: list[Message] = []
    for number, raw in enumerate(value, start=1):
        where = f"message {number}"
        if not isinstance(raw, dict):
            raise BadRow(f"{where} is {json_kind(raw)}, expected an object")
        role_key = next((k for k in (tags.get("role_tag"), *_ROLE_KEYS) if k in raw), None)
        content_key = next((k for k in (tags.get("content_tag"), *_CONTENT_KEYS) if k in raw), None)
        if role_key is None:
            # ms-swift: {"user": "...", "assistant": "..."}, a turn in one object
            pair = [(roles[k], text) for k, text in raw.items() if k in roles]
            if not pair:
                raise BadRow(f"{where} has no role; its keys: {', '.join(map(json.dumps, raw))}")
            found += [Message(role, texts.of(text, where)) for role, text in pair]
            continue
        role = roles.get(raw[role_key])
        if role is None:
            raise BadRow(f"{where} has the role {raw[role_key]!r}; known: {', '.join(roles)}")
        text = _content(raw.get(content_key) if content_key else None, where, texts)
        if not text and raw.get("tool_calls"):
            role, text = CALL, json.dumps(raw["tool_calls"], ensure_ascii=False)
        is_learnt = raw.get("weight", 1) != 0 and raw.get("loss") is not False
        found.append(Message(role, text, is_learnt))
    return found


def _content(value: Any, where: str, texts: Texts) -> str:
    """The text of a message; OpenAI's may be a list of parts."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value} - {"text"}
        if kinds:
            raise BadRow(f"{where} has a part of type {kinds.pop()!r}; only text is possible")
        return "".join(texts.of(part.get("text"), where) for part in value)
    return texts.of(value, where)


def history_of(value: Any, texts: Texts) -> list[Message]:
    """The messages of Alpaca's history: pairs of a question and its answer.

    Raises:
        BadRow: they are no pairs.
    """
    found: list[Message] = []
    value = structure(value)
    for pair in value if isinstance(value, list) else [value] if value else []:
        if isinstance(pair, dict):
            found += messages_of([pair], texts)
        elif isinstance(pair, list) and len(pair) == 2:
            found.append(Message(USER, texts.of(pair[0], "history")))
            found.append(Message(ASSISTANT, texts.of(pair[1], "history")))
        else:
            raise BadRow(f"history has {json_kind(pair)}, expected pairs of question and answer")
    return found


def history_record(messages: list[Message]) -> dict[str, dict[str, str]]:
    """Messages as part of a record, numbered from 1."""
    return {str(i): {m.role: m.text} for i, m in enumerate(messages, start=1)}


def dialogue_records(
    messages: list[Message], *, system: str = "", tools: str = "", last_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields a record for each reply that is to be learnt, or for the last of them.

    A dialogue without any reply gives one record with an empty answer.

    Raises:
        BadRow: there is no reply to learn and no message that could get one.
    """
    system = "\n".join([*filter(None, [system]), *(m.text for m in messages if m.role == SYSTEM)])
    spoken = [m for m in messages if m.role != SYSTEM]
    replies = [
        i
        for i, message in enumerate(spoken)
        if i and message.role in (ASSISTANT, CALL) and message.is_learnt
    ]
    if not any(m.role in (ASSISTANT, CALL) for m in spoken) and spoken:
        replies = [len(spoken)]
    if not replies:
        raise BadRow("has no reply that follows a message")
    for i in replies[-1:] if last_only else replies:
        before = spoken[:i]
        record: dict[str, Any] = {"system": system, "tools": tools}
        record = {key: text for key, text in record.items() if text}
        last = before.pop() if before[-1].role in (USER, OBSERVATION) else None
        if before:
            record["history"] = history_record(before)
        if last is not None:
            record["input" if last.role == USER else last.role] = last.text
        yield {**record, ANSWER: spoken[i].text if i < len(spoken) else ""}
