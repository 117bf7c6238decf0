"""Which names a server answers to, against DNS rebinding.

A page of another site can give its own name the address 127.0.0.1, and so reach a server that only
this machine should reach: to the browser both are one site, so it also lets the page read the
answers. The browser then sends the name of that site as `Host`, which gives it away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from cpm_bee.serve.api_errors import ApiError, wrong_host
from cpm_bee.serve.body_limit import App, Message, Receive, Send
from cpm_bee.serve.responses import error_response

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def hosts_of(host: str, allowed: Collection[str]) -> frozenset[str] | None:
    """The names that requests may be sent to; None if any may.

    Args:
        host: the address to listen at.
        allowed: names that the user gives.
    """
    if "*" in allowed or not (allowed or is_loopback(host)):
        return None
    return frozenset(name.lower() for name in (*_LOOPBACK, host, *allowed))


def name_of(host: str) -> str:
    """The name in a `Host` header, without its port, in lower case; [::1] is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


class HostCheck:
    """ASGI middleware: refuses requests that were sent to another name.

    Args:
        hosts: see `hosts_of`.
        on_error: is told of each refusal.
    """

    def __init__(
        self, app: App, hosts: frozenset[str] | None, on_error: Callable[[ApiError], None]
    ) -> None:
        self._app, self._hosts, self._on_error = app, hosts, on_error

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hosts is not None:
            given = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
            # Every browser sends one.
            if any(name_of(host) not in self._hosts for host in given):
                error = wrong_host(given[0])
                self._on_error(error)
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
