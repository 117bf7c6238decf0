"""Requests in OpenAI's shape as records (docs/serving.md has the mapping in words).

A chat is the record that convert_data.py makes of the same messages (docs/format.md §1), so that a
model tuned on chats is asked in the form it has learnt. `fields` of the request are put into the
record as they are. All texts are plain; `<mask_0>`, `<option_0>` and the like stay special tokens,
as with --escape.
"""

from __future__ import annotations

from typing import Any

from cpm_bee import records
from cpm_bee.data.forms.dialogue import ASSISTANT, SYSTEM, USER, Message, dialogue_records
from cpm_bee.records import ANSWER, Record
from cpm_bee.serve.request_body import Body

INPUT = "input"
_BLANK = "<mask_0>"  # between prompt and suffix of a text completion
_ROLES = {SYSTEM: SYSTEM, "developer": SYSTEM, USER: USER, ASSISTANT: ASSISTANT}


def take_chat(body: Body) -> Record:
    """Take the record of a chat from `messages` and `fields`; problems are noted in `body`."""
    messages = body.take("messages", list)
    fields = _take_fields(body)
    if not messages:
        body.problem("messages", "a chat has a list of messages, the last one by the user")
        return {}
    turns = [_turn(body, f"messages[{i}].", given) for i, given in enumerate(messages)]
    spoken = [turn for turn in turns if turn.role != SYSTEM]
    if not spoken or spoken[-1].role != USER:
        body.problem("messages", "the last message must be the user's")
        return {}
    # A reply without text, which is to be written; earlier ones are part of the history.
    [record] = dialogue_records([*turns, Message(ASSISTANT, "")], last_only=True)
    del record[ANSWER]
    return _completed(body, "messages", record, fields)


def _turn(body: Body, path: str, given: Any) -> Message:
    if not isinstance(given, dict):
        body.problem(path[:-1], "a message is an object with role and content")
        return Message(USER, "")
    message = Body(given, path)
    role = message.take("role", str, "")
    if role not in _ROLES:
        message.problem("role", f"is one of {', '.join(_ROLES)}")
    content = message.take_any("content")
    if isinstance(content, list):
        content = "".join(_part(message, f"content[{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        message.problem("content", "expected a string or a list of text parts")
        content = ""
    message.refuse("tool_calls", ([],))
    for name in ("refusal", "function_call", "audio", "name", "tool_call_id"):
        message.refuse(name)
    body.include(message)
    return Message(_ROLES.get(role, USER), content)


def _part(message: Body, path: str, given: Any) -> str:
    if not (isinstance(given, dict) and given.get("type") == "text"):
        message.problem(path, "is not supported (only parts of the type text are)")
        return ""
    text = given.get("text")
    if not isinstance(text, str):
        message.problem(path, "has no text")
        return ""
    return text


def take_completions(body: Body, most: int) -> list[Record]:
    """Take a record for each prompt of a text completion.

    Args:
        most: prompts.
    """
    prompt = body.take_any("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        body.problem("prompt", "expected a string or a list of strings")
        prompts = []
    elif len(prompts) > most:
        body.problem("prompt", f"{len(prompts):,} prompts; a request may have {most:,}")
        prompts = []
    suffix = body.take("suffix", str)
    fields = _take_fields(body)
    own: dict[str, Any] = {ANSWER: ""}
    if suffix:
        prompts = [f"{text}{_BLANK}{suffix}" for text in prompts]
        own = {ANSWER: {_BLANK: ""}}
    return [_completed(body, "prompt", {INPUT: text}, fields, own) for text in prompts]


def _take_fields(body: Body) -> dict[str, Any]:
    fields: dict[str, Any] = body.take("fields", dict, {})
    return fields


def _completed(
    body: Body,
    source: str,
    record: dict[str, Any],
    fields: dict[str, Any],
    answer: dict[str, Any] | None = None,
) -> Record:
    """The record with `fields` and an answer, escaped and checked."""
    for name in fields:
        if name in record or name == ANSWER:
            body.problem(f"fields.{name}", "is made from the request already")
    whole = records.escape_texts({**record, **fields, **(answer or {ANSWER: ""})})
    for reason in records.validate(whole)[:5]:
        body.problem(source, reason)
    return whole


def take_records(body: Body, most: int, *, escape: bool) -> list[Record]:
    """Take the records of /v1/generate.

    Args:
        most: records.
        escape: whether their texts are plain.
    """
    one, several = body.take("record", dict), body.take("records", list)
    given = several if one is None else [one]
    if not given or (one is not None and several is not None):
        body.problem("records", 'give "record": {...} or "records": [{...}, ...]')
        return []
    if len(given) > most:
        body.problem("records", f"{len(given):,} records; a request may have {most:,}")
        return []
    found = []
    for i, value in enumerate(given):
        value = records.without_marks(value)
        checked = records.escape_texts(value) if escape else value
        reasons = records.validate(checked)
        for reason in reasons[:5]:
            body.problem(f"records[{i}]", reason)
        if not reasons:
            found.append(checked)
    return found
