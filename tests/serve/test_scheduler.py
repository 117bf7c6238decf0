"""The scheduler without HTTP: failures, order, and what is counted."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from folders import load
from support import ROOT

from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, RunError
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.serve.api_errors import ApiError
from cpm_bee.serve.heap import IDLE_SECONDS, HeapTrimmer
from cpm_bee.serve.metrics import Metrics
from cpm_bee.serve.options import ServeOptions
from cpm_bee.serve.scheduler import Scheduler
from cpm_bee.serve.work import Choosing, Item, Request

LENGTH = 6


@pytest.fixture(scope="module")
def model(base):
    return load(base)


@pytest.fixture
def scheduler(model, base) -> Iterator[Scheduler]:
    options = ServeOptions(load=str(base), max_length=LENGTH, max_waiting=9)
    made = Scheduler(model.model, model.tokenizer, options, 100_000, Metrics("m"))
    yield made
    made.stop()
    if made.is_alive:
        made.join(10)
        assert not made.is_alive


def request_of(model, *texts: str, choosing=None, **options) -> tuple[Request, threading.Event]:
    encoder = Encoder(model.tokenizer)
    records = [{"input": text, "<ans>": ""} for text in texts]
    items = [Item(r, Prompt.of(r, encoder), i) for i, r in enumerate(records)]
    settings = GenerationOptions(**{"beam_size": 2, "max_length": LENGTH, **options})
    request = Request(items, settings, choosing=choosing)
    done = threading.Event()
    request.notify = lambda: done.set() if request.is_done else None
    return request, done


def answers(request: Request) -> list[dict]:
    return [item.output.filled() for item in request.items if item.output is not None]


def expected(model, request: Request) -> list[dict]:
    generator = Generator(model.model, model.tokenizer)
    return [generator.generate(item.record, request.options) for item in request.items]


def test_a_failed_step_ends_its_requests_only(model, scheduler, monkeypatch) -> None:
    """The lane starts anew: later requests of the same shape are answered."""
    step = BeamSearch.step

    def failing(search: BeamSearch):
        if search.max_records == 256 // 3:  # that of beam size 3
            raise RunError("the model's logits are not finite")
        return step(search)

    monkeypatch.setattr(BeamSearch, "step", failing)
    bad, bad_done = request_of(model, "a", "b", beam_size=3)
    good, good_done = request_of(model, "春")
    scheduler.submit(bad)
    scheduler.submit(good)
    scheduler.start()
    assert bad_done.wait(20) and good_done.wait(20)
    assert bad.error is not None and bad.error.status == 500
    assert "not finite" in bad.error.error["message"]
    assert good.error is None
    monkeypatch.undo()
    again, again_done = request_of(model, "a", "b", beam_size=3)
    scheduler.submit(again)
    assert again_done.wait(20)
    assert answers(again) == expected(model, again)
    assert answers(good) == expected(model, good)


def test_free_memory_is_given_back_when_nothing_is_left_to_do(model, scheduler) -> None:
    """Once after each time of work, however short."""
    trimmed = threading.Semaphore(0)
    scheduler._heap = HeapTrimmer(trimmed.release)
    scheduler.start()
    for _ in range(2):
        request, done = request_of(model, "a")
        scheduler.submit(request)
        assert done.wait(20)
        assert trimmed.acquire(timeout=20)
    assert not trimmed.acquire(timeout=2 * IDLE_SECONDS)
    assert answers(request) == expected(model, request)


def test_more_shapes_than_lanes_are_answered_in_turn(model, scheduler) -> None:
    pairs = [request_of(model, "a", beam_size=size) for size in (1, 2, 3, 4, 5, 6, 7, 1)]
    for request, _ in pairs:
        scheduler.submit(request)
    scheduler.start()
    for request, done in pairs:
        assert done.wait(30)
        assert answers(request) == expected(model, request)


def test_the_queue_is_bounded_and_cancelling_makes_room(model, scheduler) -> None:
    """Before the thread starts, everything waits."""
    first, _ = request_of(model, *"abab")
    second, second_done = request_of(model, *"abab")
    third, third_done = request_of(model, *"ab")
    scheduler.submit(first)
    scheduler.submit(second)
    with pytest.raises(ApiError) as refused:
        scheduler.submit(third)
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    scheduler.cancel(first)
    scheduler.start()
    assert second_done.wait(20)
    assert not any(item.is_done for item in first.items) and first.is_cancelled
    scheduler.submit(third)
    assert third_done.wait(20)
    assert answers(third) == expected(model, third)


def test_stopping_fails_what_is_left(model, scheduler) -> None:
    waiting, done = request_of(model, "a")
    choosing, chosen = request_of(model, "a", choosing=Choosing(1, 0))
    scheduler.submit(waiting)
    scheduler.submit(choosing)
    scheduler.stop()
    scheduler.start()
    assert done.wait(20) and chosen.wait(20)
    for request in (waiting, choosing):
        assert request.error is not None and request.error.status == 503
    with pytest.raises(ApiError) as refused:
        scheduler.submit(request_of(model, "a")[0])
    assert refused.value.error["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": 70_000}, "--port 70000: the last port is 65535"),
        ({"beam_size": 20}, "--beam-size 20: is above --max-beams 16"),
        ({"max_length": 2000}, "--max-length 2000: is above --max-answer-tokens 1024"),
        ({"api_key": ""}, "--api-key: is empty"),
        ({"api_key": "é"}, "--api-key: a key has printable ASCII"),
    ],
)
def test_flags_that_do_not_fit(flags: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ServeOptions(**flags)


def test_a_missing_package_is_said_in_one_line() -> None:
    script = ROOT / "src" / "serve.py"
    code = "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv = ['serve.py']\n"
    code += f"sys.path.insert(0, {str(script.parent)!r})\n"
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    message = "serve.py needs the package uvicorn: pip install -e '.[serve]' (explain: E111)"
    assert done.stderr == f"error: {message}\n"
