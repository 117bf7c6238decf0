"""The page at / in headless Chromium."""

from __future__ import annotations

import re

import httpx
import pytest
from browser import browser, watched_page
from playwright.sync_api import expect
from serve_support import TINY_BASE, Served, serving

LONG = "ab天"  # the small model answers it with as many tokens as it may write


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def open_page(chromium, url: str, **settings):
    page, faults = watched_page(chromium, **settings)
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    return page, faults


def fill(page, fields: dict[str, str], options: tuple[str, ...] = ()) -> None:
    page.locator("#examples button").last.click()  # the empty one
    page.locator("#fields button.remove").click()
    for i, (name, text) in enumerate(fields.items()):
        page.click("#add-field")
        page.locator("#fields .name").nth(i).fill(name)
        page.locator("#fields .value").nth(i).fill(text)
    for i, text in enumerate(options):
        page.click("#add-option")
        page.locator("#options .value").nth(i).fill(text)


@pytest.mark.slow
def test_a_record_gets_its_answer_as_a_stream(server: Served, chromium) -> None:
    page, faults = open_page(chromium, server.url)
    assert page.locator("#model").inner_text() == "small-model"
    fill(page, {"input": LONG, "question": "a<b"})
    page.click("#settings summary")
    page.fill("#beams", "1")
    page.fill("#most", "20")
    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => window.seen.add(document.getElementById('answers').innerText);
            new MutationObserver(look).observe(
                document.getElementById('answers'), {childList: true, subtree: true});
        }"""
    )
    page.click("#write")
    expect(page.locator("#status")).to_contain_text("20 tokens", timeout=20_000)
    record = {"input": LONG, "question": "a<b", "<ans>": ""}
    body = {"record": record, "escape": True, "beam_size": 1, "max_tokens": 20}
    expected = server.post("/v1/generate", **body).json()["records"][0]
    assert page.locator(".written").inner_text() == expected["<ans>"]
    assert expected["<cut>"] and page.locator(".badge").inner_text() == "cut off at the limit"
    assert len(page.evaluate("[...window.seen]")) > 3  # it grew
    page.click("#result summary")
    assert "/v1/generate" in page.locator("#request").inner_text()
    assert faults == []


@pytest.mark.slow
def test_stop_cancels_the_request(server: Served, chromium) -> None:
    page, faults = open_page(chromium, server.url)
    aborted = server.figure("cpm_bee_request_success_total", finished_reason="abort")
    fill(page, {"input": LONG})
    page.click("#settings summary")
    page.fill("#beams", "1")
    page.fill("#most", "2000")
    page.click("#write")
    page.wait_for_selector(".written.going")
    assert page.is_disabled("#write")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    server.wait_for("cpm_bee_request_success_total", aborted + 1, finished_reason="abort")
    assert page.is_enabled("#write") and not page.is_visible("#stop")
    assert faults == []


@pytest.mark.slow
def test_options_and_languages_on_a_phone_in_the_dark(chromium, tmp_path) -> None:
    """The committed base on a record of the kind that it was trained on."""
    with serving(tmp_path, "--load", TINY_BASE) as server:
        page, faults = open_page(chromium, server.url, width=390, height=844, dark=True)
        assert page.title() == "CPM-Bee – Try the model"
        page.click("#language")
        assert page.title() == "CPM-Bee – 试用模型"
        assert page.evaluate("document.documentElement.lang") == "zh-Hans"
        # What the user has not touched follows the language.
        assert "参数" in page.locator("#fields .value").first.input_value()
        options = ("大漠孤烟直", "海上生明月")
        fill(page, {"input": "月亮照着大海。"}, options)
        page.click("#choose")
        page.wait_for_selector(".choice.best")
        shares = page.locator(".choice .share").all_inner_texts()
        found = [float(re.sub(r"[^0-9.]", "", share)) for share in shares]
        assert sum(found) == pytest.approx(100, abs=0.2)
        texts = {f"<option_{i}>": text for i, text in enumerate(options)}
        record = {"input": "月亮照着大海。", "options": texts, "<ans>": ""}
        answer = server.post("/v1/generate", record=record, choices=True).json()["records"][0]
        assert found == [pytest.approx(100 * p, abs=0.06) for p in answer["<choices>"].values()]
        best = page.locator(".choice.best .text").inner_text()
        assert best == texts[answer["<ans>"]]
        assert page.locator(".choice.best .badge").inner_text() == "最佳"
        # Nothing is wider than the phone, and the page is dark.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", color))) < 60
        page.reload()
        assert page.locator("#language").inner_text() == "English"  # it is remembered
        assert faults == []


def test_mistakes_are_said_in_the_page(server: Served, chromium) -> None:
    page, faults = open_page(chromium, server.url)
    fill(page, {"input": "a", "": "b"})
    page.click("#write")
    assert page.locator("#error").inner_text() == "A field has no name."
    page.locator("#fields .name").nth(1).fill("input")
    page.click("#write")
    assert page.locator("#error").inner_text() == "Two fields have the same name: input"
    assert faults == []  # nothing was sent
    page.locator("#fields .name").nth(1).fill("<foo_1>")
    page.click("#write")
    expect(page.locator("#error")).to_contain_text("<foo>")
    assert all("status of 400" in fault for fault in faults)


def test_the_page_is_one_file_that_talks_to_its_server_only(server: Served) -> None:
    answer = httpx.get(f"{server.url}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", answer.text)
    assert len(set(re.findall(r"\n  (en|zh): \{", answer.text))) == 2


def test_both_languages_have_all_texts(server: Served, chromium) -> None:
    page, _ = open_page(chromium, server.url)
    names = page.evaluate("[TEXTS.en, TEXTS.zh].map((own) => Object.keys(own).sort())")
    assert names[0] == names[1]
    used = page.evaluate(
        "[...document.querySelectorAll('[data-text]')].map((e) => e.dataset.text)"
        ".concat([...document.querySelectorAll('[data-label]')].map((e) => e.dataset.label))"
    )
    assert set(used) <= set(names[0]) and used
