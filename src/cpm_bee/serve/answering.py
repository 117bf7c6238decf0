"""From the body of a request to its answers: checks, limits, time, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpm_bee import records as record_checks
from cpm_bee.errors import InputError
from cpm_bee.generate.choices import choose
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.records import Record
from cpm_bee.serve.messages import BadRequest, plain_text
from cpm_bee.serve.metrics import Metrics
from cpm_bee.serve.options import ServeOptions
from cpm_bee.serve.requests import CommonRequest, options_of
from cpm_bee.serve.scheduler import QueueFull, Scheduler, Ticket, Update

_RETRY_SECONDS = 1


class Failure(Exception):
    """A request that is refused or fails, with what the client is told.

    Args:
        type: OpenAI's kind of error, such as "invalid_request_error".
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(_RETRY_SECONDS)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        fields = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


class Answer(NamedTuple):
    """A finished answer of the model.

    Attributes:
        texts: plain, one for each answer of the record; None for one that was not reached.
        finish_reason: "stop", or "length" for an answer that was cut off.
    """

    texts: list[str | None]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def text(self) -> str:
        return "\n".join(text or "" for text in self.texts)


class Delta(NamedTuple):
    """A piece of a streamed answer; the last one has the whole `answer`."""

    text: str
    answer: Answer | None = None


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """The number of tokens, as OpenAI's interface has it."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass(frozen=True)
class Answering:
    """Answers requests with a scheduler."""

    scheduler: Scheduler
    options: ServeOptions
    metrics: Metrics

    @property
    def is_healthy(self) -> bool:
        return self.scheduler.is_alive

    def check_model(self, name: str | None) -> None:
        """Raise `Failure` 404 if a request is for another model."""
        if name is not None and name != self.options.model_name:
            raise Failure(
                404,
                f"the model {name!r} does not exist; this server has {self.options.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def begin(self, body: CommonRequest, records: Sequence[Record]) -> list[Ticket]:
        """Check a request and queue its records.

        Raises:
            Failure: 404 for another model, 429 if too many requests wait.
            BadRequest: a field or a record is not valid.
        """
        self.check_model(body.model)
        body.check_supported()
        options = options_of(body, self.options.generation)
        prompts = [self._prompt(record, i) for i, record in enumerate(records)]
        streams = body.stream and options.num_beams == 1
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                tickets.append(self.scheduler.submit(prompt, options, wants_updates=streams))
        except QueueFull:
            for ticket in tickets:
                ticket.cancelled = True
            raise Failure(
                429,
                "too many requests are waiting; try again in a moment",
                type="rate_limit_error",
                code="rate_limit_exceeded",
            ) from None
        return tickets

    def _prompt(self, record: Record, number: int) -> Prompt:
        where = f"records[{number}]"
        if problems := record_checks.validate(record):
            raise BadRequest("; ".join(problems[:5]), where)
        try:
            prompt = Prompt.of(record, self.scheduler.generator.encoder)
        except InputError as error:
            raise BadRequest(str(error), where) from None
        if len(prompt.encoded) > self.options.max_prompt_tokens:
            raise Failure(
                400,
                f"the prompt has {len(prompt.encoded)} tokens, this server reads up to "
                f"{self.options.max_prompt_tokens} (--max-prompt-tokens)",
                param=where,
                code="context_length_exceeded",
            )
        return prompt

    async def answer(self, ticket: Ticket) -> Answer:
        """Wait for the answer to a request; raises `Failure` as `deltas`."""
        async with aclosing(self.deltas(ticket)) as deltas:
            async for delta in deltas:
                if delta.answer is not None:
                    return delta.answer
        raise AssertionError("the last delta has the answer")

    async def deltas(self, ticket: Ticket) -> AsyncGenerator[Delta, None]:
        """Yields the pieces of an answer as they are written, the last one with all of it.

        Raises:
            Failure: 503 if the time is up or the model failed.
        """
        sent, is_first = "", True
        try:
            async with aclosing(ticket.updates(self.options.timeout)) as updates:
                async for update in updates:
                    if update.error is not None:
                        raise Failure(503, update.error, type="server_error")
                    if is_first and update.num_tokens:
                        self.metrics.first_token.observe(time.monotonic() - ticket.submitted)
                        is_first = False
                    answer = self._finish(ticket, update) if update.ended else None
                    text = answer.text if answer else _joined(update)
                    yield Delta(text[len(sent) :], answer)
                    sent = text
        except asyncio.TimeoutError:
            raise Failure(
                503,
                f"no answer within {self.options.timeout:g} seconds (--timeout)",
                type="server_error",
                code="timeout",
            ) from None

    def _finish(self, ticket: Ticket, update: Update) -> Answer:
        reason = "length" if update.was_cut else "stop"
        answer = Answer(
            [_plain(text) for text in update.texts],
            reason,
            len(ticket.prompt.encoded),
            update.num_tokens,
        )
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        self.metrics.generation_tokens.inc(answer.completion_tokens)
        self.metrics.success.labels(reason).inc()
        self.metrics.latency.observe(time.monotonic() - ticket.submitted)
        return answer


def _plain(text: str | None) -> str | None:
    plain = plain_text(text)
    assert not isinstance(plain, dict)
    return plain


def _joined(update: Update) -> str:
    """The texts so far, as `Answer.text` joins them; those not reached yet are left out."""
    return "\n".join(_plain(text) or "" for text in update.texts if text is not None)


def filled(record: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """Returns a record with the plain texts of an answer."""
    return fill_answers(record, answer.texts)


async def choices(answering: Answering, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The probabilities of the options of each record.

    Raises:
        BadRequest: a record has no options.
    """
    generator = answering.scheduler.generator
    for i, record in enumerate(records):
        answering._prompt(record, i)
        if not record_checks.options_of(record):
            raise BadRequest("has no options", f"records[{i}]")
    found = await asyncio.to_thread(
        choose, generator.model, generator.encoder, list(records), max_tokens=8192
    )
    return [
        {"best": choice.best, "probabilities": choice.probabilities} for choice in found if choice
    ]
