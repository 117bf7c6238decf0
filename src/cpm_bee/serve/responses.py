"""JSON and event streams (SSE) as responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cpm_bee.serve.api_errors import ApiError
from cpm_bee.serve.pending import Pending
from cpm_bee.serve.work import Request


def _encoded(value: Any) -> bytes:
    # A half of a surrogate pair, which a client may have sent, cannot be sent back.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encoded(content)


def error_response(error: ApiError) -> JsonResponse:
    return JsonResponse(error.body, error.status, error.headers)


class Form(Protocol):
    """What the events of a stream are: `missing` is called after each change of the request."""

    def first_chunks(self, request: Request) -> Iterator[dict[str, Any]]: ...
    def missing(self, request: Request) -> Iterator[dict[str, Any]]: ...
    def last_chunks(self, request: Request) -> Iterator[dict[str, Any]]: ...


class EventStream(StreamingResponse):
    """The chunks of a request as server-sent events, with `[DONE]` at the end.

    An error that comes later than the status is an event of its own. When the client leaves, the
    request is dropped, also if it leaves before the first event.
    """

    def __init__(self, pending: Pending, form: Form, on_error: Callable[[ApiError], None]) -> None:
        self._pending, self._form, self._on_error = pending, form, on_error
        # A proxy that gathers the response would make a stream useless (nginx reads the header).
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.close()

    async def _events(self) -> AsyncIterator[bytes]:
        request = self._pending.request
        try:
            for chunk in self._form.first_chunks(request):
                yield _event(chunk)
            is_done = False
            while not is_done:
                is_done = await self._pending.wait()
                for chunk in self._form.missing(request):
                    yield _event(chunk)
            for chunk in self._form.last_chunks(request):
                yield _event(chunk)
        except ApiError as error:
            self._on_error(error)
            yield _event(error.body)
        except asyncio.CancelledError:
            self._pending.close()
            raise
        yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encoded(value) + b"\n\n"
