"""Answers in the shapes of OpenAI's API: whole, and as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cpm_bee.generate.generator import Output, growth
from cpm_bee.generate.job import answers_of
from cpm_bee.serve.work import Request


class Written(NamedTuple):
    """An answer: its plain text, and whether it was cut off at the limit."""

    text: str
    was_cut: bool

    @property
    def finish_reason(self) -> str:
        return "length" if self.was_cut else "stop"


def answers_written(output: Output) -> list[Written]:
    """The answers of a record with one answer leaf, best first."""
    job = output.job
    assert job is not None
    return [
        Written(job.stop.plain(output.prompt.text(answers_of(own.tokens)[0])), not own.is_whole)
        for own in job.best
    ]


def usage_of(request: Request) -> dict[str, int]:
    prompt, generated = request.prompt_tokens, request.generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


class Form:
    """The shape of one response.

    Args:
        model: its name.
        fingerprint: of what answers, the same as long as equal requests have equal answers.
        is_chat: else a text completion.
        include_usage: whether a stream tells the numbers of tokens at its end.
    """

    def __init__(
        self, model: str, fingerprint: str, *, is_chat: bool, include_usage: bool = False
    ) -> None:
        self._is_chat, self._include_usage = is_chat, include_usage
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        # What has been sent of the texts of each record; None once it is done.
        self._texts: dict[int, Sequence[str] | None] = {}

    def whole(self, request: Request) -> dict[str, Any]:
        """The response of a request that is done."""
        answers = [w for item in request.items if item.output for w in answers_written(item.output)]
        choices = []
        for i, written in enumerate(answers):
            text: dict[str, Any] = {"text": written.text}
            if self._is_chat:
                message = {"role": "assistant", "content": written.text, "refusal": None}
                text = {"message": message}
            choices.append(
                {"index": i, **text, "logprobs": None, "finish_reason": written.finish_reason}
            )
        return {**self._head, "choices": choices, "usage": usage_of(request)}

    # ------------------------------------------------------------------ streams

    def first_chunks(self, request: Request) -> Iterator[dict[str, Any]]:
        """The beginning of a stream: each choice of a chat begins with its role."""
        if self._is_chat:
            for index in range(len(request.items) * request.options.num_return):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def missing(self, request: Request) -> Iterator[dict[str, Any]]:
        """The chunks of what has been written since the last call.

        With one answer for a record its text is sent as it grows. Of several, the best is known
        only at the end, so they are sent whole then.
        """
        count = request.options.num_return
        for i, item in enumerate(request.items):
            before = self._texts.get(i, ())
            if before is None:
                continue
            output = item.output  # before the texts, which another thread writes first
            if output is None:
                if count == 1:
                    # Escaped texts grow by whole tokens, so plain ones grow too.
                    texts = [request.stop.plain_so_far(text) for text in item.texts]
                    yield from self._grown(i, before, texts)
                continue
            answers = answers_written(output)
            for j, written in enumerate(answers):
                if count == 1:
                    yield from self._grown(i, before, [written.text])
                elif written.text:
                    yield self._grown_chunk(i * count + j, written.text)
                yield self._ended_chunk(i * count + j, written)
            self._texts[i] = None  # it is done

    def _grown(
        self, i: int, before: Sequence[str], texts: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        for _, text in growth(before, texts):
            yield self._grown_chunk(i, text)
        self._texts[i] = texts

    def _grown_chunk(self, index: int, text: str) -> dict[str, Any]:
        """The chunk for a text that a choice has gained."""
        return self._chunk(index, {"content": text} if self._is_chat else text)

    def _ended_chunk(self, index: int, written: Written) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk(index, {} if self._is_chat else "", written.finish_reason)

    def last_chunks(self, request: Request) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield {**self._chunk_head(), "choices": [], "usage": usage_of(request)}

    def _chunk(self, index: int, content: Any, reason: str | None = None) -> dict[str, Any]:
        name = "delta" if self._is_chat else "text"
        choice = {"index": index, name: content, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._chunk_head(), "choices": [choice], **usage}

    def _chunk_head(self) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": name}
