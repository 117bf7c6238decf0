"""The routes of the server: OpenAI's interface, records, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cpm_bee.serve.answering import Answer, Answering, Failure, choices, filled, usage_of
from cpm_bee.serve.body_limit import BodyLimit
from cpm_bee.serve.messages import BadRequest, plain_record, record_of_messages, record_of_text
from cpm_bee.serve.openai_form import (
    DONE,
    chat_events,
    chat_response,
    completion_events,
    completion_response,
    event,
)
from cpm_bee.serve.requests import ChatRequest, CompletionRequest, GenerateRequest
from cpm_bee.serve.scheduler import Ticket

_EVENTS = "text/event-stream"


def make_app(
    answering: Answering, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]
) -> FastAPI:
    """Returns the application; `lifespan` starts its scheduler and stops it."""
    options = answering.options
    app = FastAPI(title="CPM-Bee", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimit, max_body=options.max_body)
    _handle_errors(app, answering)
    key, started = options.key, int(time.time())

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise Failure(401, "the API key is missing or wrong", code="invalid_api_key")

    needs_key = [Depends(authorized)]
    card = {"id": options.model_name, "object": "model", "created": started, "owned_by": "cpm_bee"}

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files("cpm_bee.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if answering.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(answering.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=needs_key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", dependencies=needs_key)
    async def model(name: str) -> dict[str, Any]:
        answering.check_model(name)
        return card

    @app.post("/v1/chat/completions", dependencies=needs_key)
    async def chat(body: ChatRequest, request: Request) -> Response:
        (ticket,) = answering.begin(body, [record_of_messages(body.messages)])
        if body.stream:
            deltas = answering.deltas(ticket)
            events = chat_events(options.model_name, deltas, include_usage=body.includes_usage)
            return StreamingResponse(events, media_type=_EVENTS)
        (answer,) = await _while_connected(request, answering, [ticket])
        return JSONResponse(chat_response(options.model_name, answer))

    @app.post("/v1/completions", dependencies=needs_key)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if not body.prompts or (body.stream and len(body.prompts) > 1):
            raise BadRequest("give one prompt (or several without stream)", "prompt")
        tickets = answering.begin(body, [record_of_text(text) for text in body.prompts])
        if body.stream:
            deltas = answering.deltas(tickets[0])
            events = completion_events(
                options.model_name, deltas, include_usage=body.includes_usage
            )
            return StreamingResponse(events, media_type=_EVENTS)
        answers = await _while_connected(request, answering, tickets)
        return JSONResponse(completion_response(options.model_name, answers))

    @app.post("/v1/generate", dependencies=needs_key)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        records = [plain_record(r) if body.escape else r for r in body.records]
        if body.choices:
            return JSONResponse({"choices": await choices(answering, records)})
        if body.stream and len(records) > 1:
            raise BadRequest("give one record (or several without stream)", "records")
        tickets = answering.begin(body, records)
        if body.stream:
            events = _record_events(answering, tickets[0], body.records[0])
            return StreamingResponse(events, media_type=_EVENTS)
        answers = await _while_connected(request, answering, tickets)
        done = [filled(record, a) for record, a in zip(body.records, answers, strict=True)]
        reasons = [answer.finish_reason for answer in answers]
        return JSONResponse(
            {"records": done, "finish_reasons": reasons, "usage": usage_of(answers)}
        )

    return app


async def _record_events(
    answering: Answering, ticket: Ticket, record: dict[str, Any]
) -> AsyncIterator[bytes]:
    """Events with the pieces of the answer under "text"; the last has the answered record."""
    try:
        async for delta in answering.deltas(ticket):
            if delta.answer is None:
                yield event({"text": delta.text})
            else:
                last = {"text": delta.text, "record": filled(record, delta.answer)}
                yield event({**last, "finish_reason": delta.answer.finish_reason})
    except Failure as failure:
        yield event(failure.body())
    yield DONE


async def _while_connected(
    request: Request, answering: Answering, tickets: Sequence[Ticket]
) -> list[Answer]:
    """The answers to a request; drops it when its client leaves."""
    wanted = asyncio.gather(*(answering.answer(ticket) for ticket in tickets))
    left = asyncio.ensure_future(_disconnected(request))
    try:
        both: list[asyncio.Future[Any]] = [wanted, left]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise Failure(503, "the client left", type="server_error")
        return list(wanted.result())
    finally:
        wanted.cancel()
        left.cancel()
        for ticket in tickets:
            ticket.cancelled = True


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _handle_errors(app: FastAPI, answering: Answering) -> None:
    """Every error has OpenAI's form and is counted."""

    def response(failure: Failure) -> JSONResponse:
        answering.metrics.errors.labels(str(failure.status)).inc()
        return JSONResponse(failure.body(), failure.status, headers=failure.headers)

    async def handler(request: Request, error: Any) -> JSONResponse:
        if isinstance(error, Failure):
            return response(error)
        if isinstance(error, BadRequest):
            return response(Failure(400, str(error), param=error.param))
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if part != "body")
            return response(Failure(400, f"{where}: {first['msg']}", param=where or None))
        if isinstance(error, HTTPException):
            return response(Failure(error.status_code, str(error.detail)))
        return response(Failure(500, "the server failed; see its log", type="server_error"))

    for kind in (Failure, BadRequest, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handler)
