"""Errors of the API, in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        param: the field of the request that is wrong.
        code: a short name for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, type="invalid_request_error", param=param, code=code)


def too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body of the request has more than {most:,} bytes",
        type="invalid_request_error",
        code="request_too_large",
        headers={"Connection": "close"},  # what else the client sends is not read
    )


def wrong_host(given: str) -> ApiError:
    return ApiError(
        403,
        f"this server does not answer to the host {given[:80]!r}; whoever runs it can allow it "
        "with --allowed-hosts",
        type="invalid_request_error",
        code="host_not_allowed",
    )


def wrong_key() -> ApiError:
    return ApiError(
        401,
        "this server needs its key: send the header `Authorization: Bearer KEY`",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def unknown_model(name: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {name!r} here; this server has {served!r}",
        type="invalid_request_error",
        param="model",
        code="model_not_found",
    )


def queue_full(seconds: int) -> ApiError:
    return ApiError(
        429,
        f"too many records are waiting; try again in about {seconds} s",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        503,
        f"the request was not finished within {seconds:g} s",
        type="server_error",
        code="timeout",
        headers={"Retry-After": "30"},
    )


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down",
        type="server_error",
        code="shutting_down",
        headers={"Retry-After": "30"},
    )


def failed(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")
