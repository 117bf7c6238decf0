"""Refuses bodies that are larger than allowed, before they are read as a whole."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cpm_bee.serve.answering import Failure


class _TooLarge(Exception):
    pass


class BodyLimit:
    """ASGI middleware; counts what arrives, since `Content-Length` may be missing or wrong."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        received, has_begun = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise _TooLarge
            return message

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            if declared.isdigit() and int(declared) > self._max_body:
                raise _TooLarge
            await self._app(scope, counted, sent)
        except _TooLarge:
            if not has_begun:
                await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        message = f"the request is larger than {self._max_body} bytes (--max-body)"
        body = json.dumps(Failure(413, message).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
