"""Many clients at once, clients that leave, queues that are full, and the end of the server."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from folders import load
from serve_support import Served, serving
from support import run_script

CHAT = "/v1/chat/completions"
LONG = "ab天"  # the small model answers it with as many tokens as it may write
MEMORY = 40 << 20  # bytes that a warm server may gain


def in_parallel(count: int, ask: Callable) -> list:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


@pytest.mark.slow
def test_64_clients_have_the_answers_of_the_command_line(server: Served, base, tmp_path) -> None:
    """Each client asks twice; a refusal with 429 is the only error, and is tried again."""
    inputs = ["春", "风a", "ab天", "b", "天b", "x春风", "<mask_0>a", "𠮷a"]
    records = [{"input": text, "<ans>": ""} for text in inputs]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    made = run_script(
        "src/text_generation.py",
        *("--load", base, "--input", "in.jsonl", "--output", "out.jsonl", "--max-length", 12),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    expected = [json.loads(s) for s in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]

    def ask(client: int) -> list[int]:
        refused = []
        with httpx.Client(base_url=server.url, timeout=120) as own:
            for turn in range(2):
                i = (client + turn) % len(records)
                while True:
                    body = {"record": records[i], "max_length": 12}
                    answer = own.post("/v1/generate", json=body)
                    if answer.status_code != 429:
                        break
                    refused.append(int(answer.headers["Retry-After"]))
                    time.sleep(0.1)
                assert answer.status_code == 200, answer.text
                assert answer.json()["records"] == [expected[i]]
        return refused

    in_parallel(64, ask)
    before = server.memory()
    in_parallel(64, ask)
    assert server.memory() < before + MEMORY
    server.wait_for("cpm_bee_num_requests_running", 0)
    assert server.figure("cpm_bee_num_requests_waiting") == 0
    # They shared batches: alone, each of 256 records takes at least its own steps.
    assert server.figure("cpm_bee_kv_cache_usage_perc") == 0


@pytest.mark.slow
def test_requests_of_all_kinds_at_once(server: Served) -> None:
    """More shapes than lanes; each request has the answer that it has alone."""
    kinds: list[dict] = [{"beam_size": n} for n in (1, 2, 3, 4, 5)]
    kinds += [{"temperature": 1, "seed": 4, "n": n} for n in (1, 2, 3)]
    kinds += [{"beam_size": 2, "max_tokens": 60}]
    bodies = [{"max_tokens": 6, **kind, "prompt": [LONG, "春"]} for kind in kinds]

    def ask(i: int) -> list:
        answer = server.post("/v1/completions", **bodies[i % len(bodies)])
        return answer.json()["choices"]

    alone = [ask(i) for i in range(len(bodies))]
    together = in_parallel(2 * len(bodies), ask)
    assert together == 2 * alone


def test_a_client_that_leaves_frees_its_slot(server: Served) -> None:
    server.wait_for("cpm_bee_num_requests_running", 0)
    aborted = server.figure("cpm_bee_request_success_total", finished_reason="abort")
    for stream in (True, False):
        body = {"prompt": LONG, "max_tokens": 2000, "beam_size": 1, "stream": stream}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            request = client.build_request("POST", "/v1/completions", json=body)
            if stream:
                answer = client.send(request, stream=True)
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                server.wait_for("cpm_bee_num_requests_running", 1)
                answer.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(
                        client.build_request("POST", "/v1/completions", json=body, timeout=0.5)
                    )
        aborted += 1
        server.wait_for("cpm_bee_request_success_total", aborted, finished_reason="abort")
        server.wait_for("cpm_bee_num_requests_running", 0)


@pytest.fixture(scope="module")
def narrow(base, tmp_path_factory):
    """A server with room for one record at a time, a queue of three, and a key."""
    found = load(base)
    # Four lanes, each with room for one record of 12 + (2001 + 1) tokens.
    flags = ("--max-tokens", 4 * 2100, "--max-waiting", 3, "--max-answer-tokens", 2000)
    assert found.model.config.num_layers
    with serving(
        tmp_path_factory.mktemp("narrow"),
        *("--load", base, "--timeout", 3, *flags),
        CPM_BEE_API_KEY="s3cret",
    ) as started:
        yield started


def held(server: Served, stop: threading.Event) -> None:
    """Hold the slot until `stop`."""
    body = {"prompt": LONG, "max_tokens": 2000, "beam_size": 1, "stream": True}
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60
    ) as answer:
        for _ in answer.iter_lines():
            if stop.is_set():
                return


def test_a_key_is_asked_for(narrow: Served) -> None:
    wrong = narrow.openai(api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as refused:
        wrong.models.list()
    assert refused.value.code == "invalid_api_key"
    for headers in ({}, {"Authorization": "Basic s3cret"}, {"Authorization": "Bearer s3cre"}):
        assert httpx.get(f"{narrow.url}/v1/models", headers=headers).status_code == 401
    assert narrow.openai().models.list().data
    # They hold no secrets, and whoever watches the server has no key.
    for path in ("/health", "/metrics", "/"):
        assert httpx.get(narrow.url + path).status_code == 200
    command = Path(f"/proc/{narrow.process.pid}/cmdline").read_text(encoding="utf-8")
    assert "s3cret" not in command


def test_a_full_queue_refuses_with_429_and_a_time(narrow: Served) -> None:
    stop = threading.Event()
    holder = threading.Thread(target=held, args=(narrow, stop))
    holder.start()
    try:
        narrow.wait_for("cpm_bee_num_requests_running", 1)
        client = narrow.openai()
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="small-model", prompt=["a"] * 4)
        assert refused.value.code == "queue_full"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        error = refused.value.response.json()["error"]
        assert error["type"] == "rate_limit_error"
    finally:
        stop.set()
        holder.join()


def test_a_request_that_takes_too_long_ends_with_503(narrow: Served) -> None:
    body = {"prompt": LONG, "max_tokens": 2000, "beam_size": 1}
    headers = {"Authorization": "Bearer s3cret"}
    stop = threading.Event()
    # Two of them share the time.
    holders = [threading.Thread(target=held, args=(narrow, stop)) for _ in range(2)]
    for holder in holders:
        holder.start()
    try:
        answer = httpx.post(f"{narrow.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "timeout"
    finally:
        stop.set()
        for holder in holders:
            holder.join()
    narrow.wait_for("cpm_bee_num_requests_running", 0)


def test_a_request_beyond_the_memory_is_refused(narrow: Served) -> None:
    headers = {"Authorization": "Bearer s3cret"}
    body = {"prompt": "a", "max_tokens": 2000, "beam_size": 3}
    answer = httpx.post(f"{narrow.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert "fewer beams or a shorter answer" in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("grace", [30, 0])
def test_sigterm_lets_running_requests_finish(base, tmp_path, grace: int) -> None:
    """Within the time of grace; else they end with an error. The exit status is 0."""
    flags = ("--load", base, "--grace", grace, "--max-answer-tokens", 2000)
    with serving(tmp_path, *flags) as server:
        answers: list[httpx.Response] = []
        tokens = 300 if grace else 2000
        body = {"prompt": LONG, "max_tokens": tokens, "beam_size": 1}
        asking = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", **body))
        )
        streamed: list[str] = []

        def stream() -> None:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60
            ) as answer:
                streamed.extend(line for line in answer.iter_lines() if line)

        streaming = threading.Thread(target=stream)
        asking.start()
        streaming.start()
        server.wait_for("cpm_bee_num_requests_running", 2)
        assert server.stop(signal.SIGTERM) == 0
        asking.join()
        streaming.join()
        [answer] = answers
        assert streamed[-1] == "data: [DONE]"
        if grace:
            assert answer.json()["usage"]["completion_tokens"] == tokens
            assert '"finish_reason": "length"' in streamed[-2]
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
            assert '"shutting_down"' in streamed[-2]
        assert server.log.read_text(encoding="utf-8") == ""


def test_a_port_in_use_is_said_before_the_model_is_loaded(server: Served, tmp_path) -> None:
    port = server.url.rpartition(":")[2]
    done = run_script("src/serve.py", "--load", tmp_path / "none", "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: address already in use")
