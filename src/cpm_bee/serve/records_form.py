"""Answers of /v1/generate: the records, as text_generation.py writes them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpm_bee.generate.generator import growth
from cpm_bee.records import ANSWER, CANDIDATES, CHOICES, Record
from cpm_bee.serve.openai_form import usage_of
from cpm_bee.serve.work import Item, Request
from cpm_bee.tokenizer import unescape


class RecordsForm:
    """The shape of one response.

    Args:
        given: the records as the client sent them.
        escape: whether their texts are plain; then answers are, too.
        abstain_below: an option with less probability is no answer, but None.
    """

    def __init__(
        self, model: str, given: Sequence[Record], *, escape: bool, abstain_below: float = 0.0
    ) -> None:
        self._given, self._escape, self._abstain_below = given, escape, abstain_below
        self._head = {
            "id": "gen-" + secrets.token_hex(12),
            "object": "generation",
            "created": int(time.time()),
            "model": model,
        }
        self._texts: list[Sequence[str]] = [()] * len(given)
        self._is_done = [False] * len(given)

    def whole(self, request: Request) -> dict[str, Any]:
        """The response of a request that is done."""
        answered = [self._record(i, item) for i, item in enumerate(request.items)]
        return {**self._head, "records": answered, "usage": usage_of(request)}

    def first_chunks(self, request: Request) -> Iterator[dict[str, Any]]:
        yield {**self._head, "object": "generation.chunk"}

    def missing(self, request: Request) -> Iterator[dict[str, Any]]:
        """What has been written since the last call.

        {"index": record, "answer": number of the text under <ans>, "delta": text}, and at the end
        of a record {"index": record, "record": {...}}.
        """
        for i, item in enumerate(request.items):
            if self._is_done[i]:
                continue
            is_done = item.is_done  # before the texts, which another thread writes first
            texts = [self._plain(text) for text in item.texts]
            if request.options.num_return == 1:
                for answer, text in growth(self._texts[i], texts):
                    yield {"index": i, "answer": answer, "delta": text}
            self._texts[i] = texts
            if is_done:
                self._is_done[i] = True
                yield {"index": i, "record": self._record(i, item)}

    def last_chunks(self, request: Request) -> Iterator[dict[str, Any]]:
        yield {"usage": usage_of(request)}

    def _record(self, i: int, item: Item) -> dict[str, Any]:
        record: dict[str, Any] = dict(self._given[i])
        if item.choice is not None:
            best = item.choice.best
            chosen = item.choice.probabilities[best] >= self._abstain_below
            record[ANSWER] = best if chosen else None
            record[CHOICES] = item.choice.probabilities
            return record
        assert item.output is not None
        filled = item.output.filled()
        marks = {key: value for key, value in filled.items() if key not in item.record}
        if CANDIDATES in marks:
            marks[CANDIDATES] = [
                {**own, ANSWER: self._unescaped(own[ANSWER])} for own in marks[CANDIDATES]
            ]
        return {**record, ANSWER: self._unescaped(filled[ANSWER]), **marks}

    def _unescaped(self, answer: Any) -> Any:
        if isinstance(answer, Mapping):
            return {key: self._unescaped(value) for key, value in answer.items()}
        return None if answer is None else self._plain(answer)

    def _plain(self, text: str) -> str:
        return unescape(text) if self._escape else text
