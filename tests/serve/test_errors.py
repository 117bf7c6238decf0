"""What is wrong with a request is said in OpenAI's shape, by name, with the right status."""

from __future__ import annotations

import contextlib
import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from serve_support import Served

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RECORDS = "/v1/generate"
HELLO = [{"role": "user", "content": "a"}]
RECORD = {"input": "a", "<ans>": ""}


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {}, "messages", "list of messages"),
        (CHAT, {"messages": []}, "messages", "list of messages"),
        (CHAT, {"messages": "a"}, "messages", "expected a list"),
        (CHAT, {"messages": ["a"]}, "messages[0]", "object with role"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "is one of"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        (CHAT, {"messages": [{"role": "system", "content": "a"}]}, "messages", "user's"),
        (CHAT, {"messages": [{**HELLO[0], "name": "x"}]}, "messages[0].name", "not supported"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "text",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        (CHAT, {"messages": HELLO, "fields": {"input": "x"}}, "fields.input", "already"),
        (CHAT, {"messages": HELLO, "fields": {"x": 3}}, "messages", "expected text"),
        (CHAT, {"messages": HELLO, "fields": {"<foo_1>": "x"}}, "messages", "<foo> is not in"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens", "below 1"),
        (CHAT, {"messages": HELLO, "max_tokens": 2001}, "max_tokens", "above 2000"),
        (CHAT, {"messages": HELLO, "max_tokens": True}, "max_tokens", "whole number"),
        (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens", "whole number"),
        (CHAT, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, None, "differs"),
        (CHAT, {"messages": HELLO, "temperature": -1}, "temperature", "below 0"),
        (CHAT, {"messages": HELLO, "temperature": "1"}, "temperature", "a number"),
        (CHAT, {"messages": HELLO, "top_p": 0.5}, "top_p", "needs temperature above 0"),
        (CHAT, {"messages": HELLO, "temperature": 1, "beam_size": 2}, "beam_size", "temperature"),
        (CHAT, {"messages": HELLO, "n": 4}, "n", "needs beam_size 4"),
        (CHAT, {"messages": HELLO, "n": 9}, "n", "above 8"),
        (CHAT, {"messages": HELLO, "beam_size": 9}, "beam_size", "above 8"),
        (CHAT, {"messages": HELLO, "stop": ["x", ""]}, "stop", "none of them empty"),
        (CHAT, {"messages": HELLO, "stop": 3}, "stop", "a text or a list"),
        (CHAT, {"messages": HELLO, "stop": ["x"] * 5}, "stop", "up to 4 texts"),
        (TEXT, {"prompt": "a", "stop": "x" * 101}, "stop", "up to 100 characters"),
        (RECORDS, {"record": RECORD, "stop": "x"}, "stop", "not known"),
        (CHAT, {"messages": HELLO, "tools": [{}]}, "tools", "not supported"),
        (CHAT, {"messages": HELLO, "logprobs": True}, "logprobs", "not supported (only false"),
        (CHAT, {"messages": HELLO, "logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        (CHAT, {"messages": HELLO, "seed": -1}, "seed", "below 0"),
        (CHAT, {"messages": HELLO, "wrong": 1}, "wrong", "not known here"),
        (CHAT, {"messages": HELLO, "stream_options": {}}, "stream_options", "needs stream"),
        (
            CHAT,
            {"messages": HELLO, "stream": True, "stream_options": {"x": 1}},
            "stream_options.x",
            "not known",
        ),
        (CHAT, {"messages": HELLO, "model": 3}, "model", "a string"),
        (TEXT, {}, "prompt", "string"),
        (TEXT, {"prompt": [1, 2]}, "prompt", "list of strings"),
        (TEXT, {"prompt": ["a"] * 7}, "prompt", "7 prompts; a request may have 6"),
        (TEXT, {"prompt": "a", "echo": True}, "echo", "not supported"),
        (TEXT, {"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        (TEXT, {"prompt": "a" * 500}, "prompt", "this server takes 200"),
        (RECORDS, {}, "records", "give"),
        (RECORDS, {"record": RECORD, "records": [RECORD]}, "records", "give"),
        (RECORDS, {"records": [RECORD] * 7}, "records", "7 records; a request may have 6"),
        (RECORDS, {"record": {"input": "a"}}, "records[0]", 'no "<ans>"'),
        (RECORDS, {"record": {"input": "a<b", "<ans>": ""}}, "records[0]", "not closed"),
        (RECORDS, {"records": [RECORD, 3]}, "records[1]", "JSON object"),
        (RECORDS, {"record": RECORD, "choices": True}, "records[0]", "no options"),
        (RECORDS, {"record": RECORD, "average_orders": 2}, "average_orders", "needs choices"),
        (RECORDS, {"record": RECORD, "n": 1}, "n", "not known"),
        (RECORDS, {"record": {"input": "<foo_1>", "<ans>": ""}}, "records[0]", "<foo> is not in"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    server: Served, path: str, body: dict, param: str | None, words: str
) -> None:
    raw = json.dumps(body).encode()
    answer = httpx.post(
        server.url + path, content=raw, headers={"Content-Type": "application/json"}, timeout=60
    )
    error = error_of(answer, 400)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or error["param"] == param


def test_all_problems_are_named_at_once(server: Served) -> None:
    answer = server.post(CHAT, messages=HELLO, stop="x" * 999, top_k=-5, nonsense=1)
    message = error_of(answer, 400)["message"]
    assert all(word in message for word in ("stop: ", "top_k: ", "nonsense: "))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "is a JSON object"),
        (b"\xff\xfe", "not"),
        (b"[" * 15_000, "nested too deeply"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_object(server: Served, content: bytes, words: str) -> None:
    answer = httpx.post(
        server.url + CHAT, content=content, headers={"Content-Type": "application/json"}
    )
    assert words in error_of(answer, 400)["message"]


def test_another_type_of_body(server: Served) -> None:
    """A form of another site cannot send JSON's type."""
    answer = httpx.post(server.url + CHAT, content=json.dumps({"messages": HELLO}))
    assert "application/json" in error_of(answer, 400)["message"]


def test_a_body_that_is_too_large(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "a" * 20_000}]}
    error = error_of(server.post(CHAT, **body), 413)
    assert error["code"] == "request_too_large"


def test_a_body_is_counted_where_its_length_is_not_announced(server: Served) -> None:
    """Whoever sends without end is answered and cut off, after little more than the limit."""
    parts = urlsplit(server.url)
    sent = 0
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        answer = b""
        with contextlib.suppress(OSError):  # closed, perhaps before the answer was read
            while sent < 50_000_000:
                connection.sendall(b"1000\r\n" + b"a" * 4096 + b"\r\n")
                sent += 4096
            answer = connection.recv(4096)
    assert sent < 50_000_000
    assert not answer or b" 413 " in answer
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_paths_and_methods(server: Served, method: str, path: str, status: int, code: str) -> None:
    assert error_of(httpx.request(method, server.url + path), status)["code"] == code


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics"])
@pytest.mark.parametrize(
    "host", ["rebound.example", "rebound.example:8000", "192.168.0.3", "[::2]"]
)
def test_another_host_is_refused(server: Served, path: str, host: str) -> None:
    """A page whose name has been given the address of this machine reads nothing."""
    error = error_of(httpx.get(server.url + path, headers={"Host": host}), 403)
    assert error["code"] == "host_not_allowed" and host in error["message"]
    assert "--allowed-hosts" in error["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"])
def test_names_of_this_machine_are_answered(server: Served, host: str) -> None:
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


def test_refusals_are_counted(server: Served) -> None:
    server.post(CHAT)
    before = server.figure("cpm_bee_request_refused_total", status="400")
    server.post(CHAT)
    assert server.figure("cpm_bee_request_refused_total", status="400") == before + 1
