"""A limit for the body of a request, in bytes and seconds, before anything reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cpm_bee.serve.api_errors import ApiError, too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BodyLimit:
    """ASGI middleware: reading a body that is too large, or too slow, raises `ApiError`.

    Bytes are counted as they come, so a body without Content-Length is limited too, and no more
    than the limit is ever held.

    Args:
        app: handles `ApiError`.
        most: bytes.
        seconds: for the whole body.
    """

    def __init__(self, app: App, most: int, seconds: float = 30.0) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        announced = max((int(value) for value in lengths if value.isdigit()), default=0)
        count = 0
        is_whole = False
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal count, is_whole
            if is_whole:  # what comes now is that the client has left
                return await receive()
            if announced > self._most:
                raise too_large(self._most)
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except TimeoutError:
                raise _too_slow(self._seconds) from None
            except asyncio.TimeoutError:  # another class before Python 3.11
                raise _too_slow(self._seconds) from None
            count += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if count > self._most:
                raise too_large(self._most)
            return message

        await self._app(scope, limited, send)


def _too_slow(seconds: float) -> ApiError:
    return ApiError(
        408,
        f"the body of the request did not come within {seconds:g} s",
        type="invalid_request_error",
        code="request_timeout",
        headers={"Connection": "close"},
    )
