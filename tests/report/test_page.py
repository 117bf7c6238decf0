"""The page of a run: what it says, that records cannot change it, and that a browser shows it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import browser, watched_page

from cpm_bee.html_pages import Text
from cpm_bee.report.charts import charts_of
from cpm_bee.report.draw import draw
from cpm_bee.report.drawing import Curves
from cpm_bee.report.facts import DataFigure, Facts, Setting
from cpm_bee.report.history import History
from cpm_bee.report.page import make_page, state_of

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>&\"'"
FACTS = Facts(
    name="my <run>",
    metric="loss",
    sets=["data/train", "data/eval"],
    data=[DataFigure(Text("records used", "使用的记录"), ("3,000", "400"))],
    settings=[Setting("--lr", "0.06", False), Setting("--seed", "1234", True)],
    commands=[(Text("Answer records", "回答记录"), "python text_generation.py --load 'a b'")],
    folder="/home/<me>",
    summary=["engine torch"],
    environment=[(Text("device", "设备"), "cpu")],
    files=[("results/x.pt", Text("the best weights", "最优权重"))],
)


def history_of(steps: int = 30, *, ended: bool = True, text: str = EVIL) -> History:
    """A run with an evaluation every 10 steps."""
    history = History()
    history.add({"event": "start", "task": "task", "options": {"epoch": 2}, "world_size": 1})
    for step in range(steps + 1):
        if step:
            history.add({
                "event": "train", "step": step, "epoch": 0, "loss": 3 / step, "lr": 1e-3 * step,
                "grad_norm": None if step == 2 else 1.0, "loss_scale": 1.0, "tokens": 100,
                "tokens_per_second": 50.0,
            })  # fmt: skip
        if step % 10 == 0:
            history.add({
                "event": "eval", "step": step, "loss": 2 / (step + 1), "token_accuracy": 0.5,
                "exact_match": step / 100, "records": 20,
            })  # fmt: skip
            samples = [
                {"number": 3, "context": text, "expected": "春", "written": text,
                 "is_correct": False},
                {"number": 5, "context": "b", "expected": "夏", "written": "夏",
                 "is_correct": step > 0},
            ]  # fmt: skip
            history.add({
                "event": "samples", "step": step, "host_memory": 1 << 30, "gpu_memory": None,
                "samples": samples,
            })  # fmt: skip
    if ended:
        reason = "all 2 epochs are done"
        history.add({"event": "end", "reason": reason, "step": steps, "finished": True})
    return history


def page_of(history: History, curves: Curves | None = None, **values: Any) -> str:
    given = {"lacks_matplotlib": False, "failure": "", "written": "2026-01-01 12:00:00"}
    return make_page(history, values.pop("facts", FACTS), curves, **{**given, **values})


def drawn(history: History) -> Curves:
    images = draw(charts_of(history))
    return Curves(images["svg"], b"", history.step)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in their order."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def test_it_tells_of_the_run() -> None:
    text = Reader(page_of(history_of())).text
    for told in (
        "my <run>", "finished", "all 2 epochs are done", "全部 2 轮训练已完成", "--lr", "0.06",
        "3,000", "python text_generation.py --load 'a b'", "/home/<me>", "data/eval", "1.00 GiB",
        "30.0%", "before: 0.0%", "best at step 30", "3,000 tokens in all",
    ):  # fmt: skip
        assert told in text, told


def test_records_are_text_whatever_they_contain() -> None:
    reader = Reader(page_of(history_of()))
    assert EVIL in reader.text
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in reader.tags}
    assert not [n for _, attributes in reader.tags for n in attributes if n.startswith("on")]
    half = page_of(history_of(text="\ud800"))  # half of a surrogate pair: no file can hold it
    assert half.encode("utf-8")


def test_nothing_comes_from_elsewhere() -> None:
    history = history_of()
    page = page_of(history, drawn(history))
    for tag, attributes in Reader(page).tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, attributes)
    assert "http:" not in page and "https:" not in page and "@import" not in page


def test_every_text_has_both_languages() -> None:
    page = page_of(history_of(), drawn(history_of()), lacks_matplotlib=True, failure="x")
    english = re.findall(
        r'<span class="en" lang="en">(.*?)</span><span class="zh" lang="zh">(.)', page
    )
    assert len(english) > 50
    assert page.count('class="en" lang="en"') == page.count('class="zh" lang="zh"') == len(english)


@pytest.mark.parametrize(
    ("reason", "finished", "state"),
    [
        ("all 2 epochs are done", True, "finished"),
        ("interrupted after step 3; the same command with --resume goes on from there", False,
         "interrupted"),
        ("the loss of step 4 is nan", False, "failed"),
        (None, False, "running"),
    ],
)  # fmt: skip
def test_how_it_ended(reason: str | None, finished: bool, state: str) -> None:
    history = history_of(ended=False)
    if reason is not None:
        history.add({"event": "end", "reason": reason, "step": 3, "finished": finished})
    assert state_of(history.end) == state
    page = page_of(history)
    assert f'<span class="state {state}">' in page and (reason or "Reload the page") in page
    history.add({"event": "start"})  # resumed
    assert state_of(history.end) == "running"


def test_without_curves_there_is_a_table() -> None:
    history = history_of()
    text = Reader(page_of(history, lacks_matplotlib=True)).text
    assert "Curves need an extra: pip install -e '.[report]'" in text
    assert "2.75e-02" in text or "e-02" in text
    assert "could not be drawn: no room" in Reader(page_of(history, failure="no room")).text
    assert "No step has ended yet." in page_of(History(), None)


def test_the_latest_answers_are_marked_and_the_earlier_ones_are_there() -> None:
    page = page_of(history_of())
    cards = page.partition('<section id="samples">')[2].partition("</section>")[0]
    first, second = cards.split('<div class="sample ')[1:]
    assert first.startswith("wrong") and "✗" in first and "春" in first
    assert second.startswith("right") and second.count("✗") == 1  # before the first step
    assert "10 – 30" in second and "0 – 30" in first


def test_the_best_evaluation_is_that_of_the_metric() -> None:
    history = history_of()
    history.evaluations[1]["exact_match"] = 0.9
    by_loss, by_match = (page_of(history, facts=replace(FACTS, metric=m)) for m in
                         ("loss", "exact_match"))  # fmt: skip
    assert "<td>30 <span" in by_loss and "<td>10 <span" in by_match


def test_a_long_run_is_thinned() -> None:
    history = history_of(2000)
    thinned = history.thinned("step", "loss", "grad_norm", limit=10)
    assert [len(column) for column in thinned.values()] == [10, 10, 10]
    assert thinned["loss"][0] == pytest.approx(sum(3 / s for s in range(1, 201)) / 200)
    assert not any(map(math.isnan, thinned["grad_norm"]))
    assert len(page_of(history)) < 600_000


@pytest.mark.slow
def test_curves_are_text_and_follow_the_theme() -> None:
    history = history_of()
    images = draw(charts_of(history))["svg"]
    assert list(images) == ["loss", "accuracy", "rate", "speed", "gradient", "memory"]
    for name, svg in images.items():
        assert svg.startswith("<svg") and svg.endswith("</svg>") and "<text" in svg
        assert "var(--c1)" in svg and "#0a0b0" not in svg
        ids = re.findall(r'\bid="([^"]*)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids)
        used = re.findall(r'(?:url\(#|href="#)([^")]*)', svg)
        assert used and set(used) <= set(ids)


@pytest.mark.slow
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """In both languages and themes, on a wide and a narrow screen; scripts of records never run."""
    history = history_of()
    path = tmp_path / "report.html"
    path.write_text(page_of(history, drawn(history)), encoding="utf-8")
    with browser() as own:
        for width, dark in ((1280, False), (390, True)):
            page, faults = watched_page(own, width=width, dark=dark)
            page.goto(path.as_uri())
            assert page.title() == "my <run> · CPM-Bee"
            assert page.locator("figure svg").count() == 6
            for size in page.evaluate(
                "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
                ".map(r => [r.width, r.height])"
            ):
                assert min(size) > 100
            for language, shown, hidden in (
                ("zh", "样例答案", "Sample answers"),
                ("en", "Sample answers", "样例答案"),
            ):
                page.locator(f"label[for={language}]").click()
                text = page.inner_text("main")
                assert shown in text and hidden not in text
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark
            assert faults == []
