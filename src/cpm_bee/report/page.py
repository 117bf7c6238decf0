"""The page of a run: one HTML file that needs no network and no other file."""

from __future__ import annotations

import re
from typing import Any

from cpm_bee.html_pages import LANGUAGE_SWITCH, Text, both, document, escape, escaped
from cpm_bee.report import sections
from cpm_bee.report.drawing import Curves
from cpm_bee.report.facts import Facts
from cpm_bee.report.history import History
from cpm_bee.report.style import SCRIPT, STYLE

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
_STATES = {
    RUNNING: Text("running", "训练中"),
    FINISHED: Text("finished", "已完成"),
    INTERRUPTED: Text("interrupted", "已中断"),
    FAILED: Text("failed", "失败"),
}
# The usual reasons for the end of a run, in Chinese; others stay as they are.
_REASONS = [
    (r"all (\d+) epochs are done", r"全部 \1 轮训练已完成"),
    (r"the limit of (\d+) steps \(--max-steps\) is reached", r"已达到 \1 步的上限（--max-steps）"),
    (
        r"early stop: (\d+) evaluations in a row without a lower loss",
        r"提前停止：连续 \1 次评测损失没有下降",
    ),
    (
        r"early stop: (\d+) evaluations in a row without a higher exact match",
        r"提前停止：连续 \1 次评测完全一致率没有提高",
    ),
    (
        r"interrupted after step (\d+); the same command with --resume goes on from there",
        r"在第 \1 步后中断；用同样的命令加 --resume 即可从这里继续",
    ),
]


def make_page(
    history: History,
    facts: Facts,
    curves: Curves | None,
    *,
    lacks_matplotlib: bool,
    failure: str,
    written: str,
) -> str:
    """Returns the page.

    Args:
        curves: the drawn curves, or None to show a table.
        lacks_matplotlib: curves are wanted, but their package is not installed.
        failure: why the curves could not be drawn, or "".
        written: the time.
    """
    parts = [
        _header(history, facts, written),
        sections.key_figures(history, facts.metric),
        sections.curves(history, curves, lacks_matplotlib=lacks_matplotlib, failure=failure),
        sections.evaluations(history, facts.metric),
        sections.samples(history),
        sections.commands(facts),
        sections.data(facts),
        sections.settings(history, facts),
        sections.environment(facts),
    ]
    content = "\n".join(filter(None, parts))
    return document(f"{facts.name} · CPM-Bee", content, style=STYLE, script=SCRIPT)


def state_of(end: dict[str, Any] | None) -> str:
    """Whether a run goes on or, from the last event of its log, how it ended."""
    if end is None:
        return RUNNING
    if end.get("finished", True):
        return FINISHED
    return INTERRUPTED if end["reason"].startswith("interrupted") else FAILED


def _header(history: History, facts: Facts, written: str) -> str:
    state = state_of(history.end)
    lines = [
        f'<header><h1>{escape(facts.name)}</h1><span class="state {state}">'
        f"{escaped(_STATES[state])}</span>{LANGUAGE_SWITCH}</header>"
    ]
    if history.end is not None:
        reason = history.end["reason"]
        lines.append(f'<p id="reason">{both(escape(reason), escape(_in_chinese(reason)))}</p>')
    at = escape(written)
    if state == RUNNING:
        text = both(
            f"Written at {at}. Reload the page for the newest one; it is written at each "
            "evaluation. If the time is long past, the run has been killed.",
            f"写入时间：{at}。每次评测都会重写，刷新页面即可看到最新内容；若时间已过去很久，"
            "说明训练进程已被终止。",
        )
    else:
        text = both(f"Written at {at}.", f"写入时间：{at}。")
    return "\n".join([*lines, f'<p class="soft">{text}</p>'])


def _in_chinese(reason: str) -> str:
    for pattern, chinese in _REASONS:
        if match := re.fullmatch(pattern, reason):
            return match.expand(chinese)
    return reason
