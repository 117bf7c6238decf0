"""A client that waits for its request: until something is there, it leaves, or time is up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cpm_bee.serve.api_errors import timed_out
from cpm_bee.serve.scheduler import Scheduler
from cpm_bee.serve.work import Request


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class Pending:
    """Submits a request for a client; use it in the thread of the event loop.

    Args:
        seconds: after which the request ends with an error.

    Raises:
        ApiError: the request cannot be queued.
    """

    def __init__(self, scheduler: Scheduler, request: Request, seconds: float) -> None:
        self._scheduler, self.request, self._seconds = scheduler, request, seconds
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed.set)

        request.notify = notify
        scheduler.submit(request)

    def close(self) -> None:
        """Drop what is not done yet."""
        self._scheduler.cancel(self.request)

    async def wait(self) -> bool:
        """Wait for a change; returns whether the request is done.

        Raises:
            ApiError: the request failed, or time is up.
        """
        if not self.request.is_done:
            left = self.request.arrived + self._seconds - time.monotonic()
            try:
                await asyncio.wait_for(self._changed.wait(), max(left, 0.001))
            except (TimeoutError, asyncio.TimeoutError):  # one class from Python 3.11 on
                self.close()
                raise timed_out(self._seconds) from None
        self._changed.clear()
        if self.request.error is not None:
            raise self.request.error
        return self.request.is_done

    async def done(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Wait for the end, while the client is there.

        Args:
            receive: of ASGI; the body has been read.

        Raises:
            ApiError: as `wait`.
            ClientLeft: the client has closed its connection.
        """
        watch = asyncio.create_task(_has_left(receive))
        try:
            while True:
                waiting = asyncio.create_task(self.wait())
                await asyncio.wait({waiting, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    raise ClientLeft
                if waiting.result():
                    return
        finally:
            watch.cancel()
            self.close()


async def _has_left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
