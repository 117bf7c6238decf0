"""Answers in the form of OpenAI's interface, whole and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cpm_bee.serve.answering import Answer, Delta, Failure, usage_of

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def chat_response(model: str, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None}
    return {
        **_head("chatcmpl", "chat.completion", model),
        "choices": [{**choice, "finish_reason": answer.finish_reason}],
        "usage": usage_of([answer]),
    }


def completion_response(model: str, answers: Sequence[Answer]) -> dict[str, Any]:
    choices = [
        {"index": i, "text": a.text, "logprobs": None, "finish_reason": a.finish_reason}
        for i, a in enumerate(answers)
    ]
    head = _head("cmpl", "text_completion", model)
    return {**head, "choices": choices, "usage": usage_of(answers)}


async def chat_events(
    model: str, deltas: AsyncIterator[Delta], *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a streamed chat: the role first, `[DONE]` last."""
    head = _head("chatcmpl", "chat.completion.chunk", model)

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for delta in deltas:
            if delta.text:
                yield chunk({"content": delta.text})
            if delta.answer is not None:
                yield chunk({}, delta.answer.finish_reason)
                if include_usage:
                    yield event({**head, "choices": [], "usage": usage_of([delta.answer])})
    except Failure as failure:
        yield event(failure.body())
    yield DONE


async def completion_events(
    model: str, deltas: AsyncIterator[Delta], *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a streamed completion."""
    head = _head("cmpl", "text_completion", model)

    def chunk(text: str, reason: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    try:
        async for delta in deltas:
            if delta.text or delta.answer is not None:
                yield chunk(delta.text, delta.answer and delta.answer.finish_reason)
            if delta.answer is not None and include_usage:
                yield event({**head, "choices": [], "usage": usage_of([delta.answer])})
    except Failure as failure:
        yield event(failure.body())
    yield DONE


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    name = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}
