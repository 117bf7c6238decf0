"""When the report is written: by runs that end, fail, are interrupted or resumed."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import train_support
from train_support import Run, Workspace, train

from cpm_bee.errors import InterruptedRun, RunError
from cpm_bee.report import drawing, writer
from cpm_bee.train.log import Reporter

NAME = "cpm_bee_finetune"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    with train_support.one_thread():
        return train_support.make_workspace(tmp_path_factory.mktemp("workspace") / "all")


def page_of(run: Path) -> str:
    return (run / f"{NAME}-report.html").read_text(encoding="utf-8")


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        original(self, values, **rest)
        if values["step"] == step:
            action()

    monkeypatch.setattr(Reporter, "train_step", train_step)


def test_it_is_written_at_the_start_and_at_each_evaluation(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = writer.ReportWriter.write

    def write(self: writer.ReportWriter) -> None:
        original(self)
        seen.append((self._history.step, len(self._history.evaluations)))

    monkeypatch.setattr(writer.ReportWriter, "write", write)
    flags = {"use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 2}
    train(workspace, tmp_path, max_steps=5, **flags)
    assert seen == [(0, 0), (0, 1), (2, 2), (4, 3), (5, 4)]
    page = page_of(tmp_path)
    assert 'class="state finished"' in page and "the limit of 5 steps" in page
    assert f"{workspace.eval}" in page and "--delta" in page


def test_a_run_that_fails_or_is_interrupted_says_so(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError):
        train(workspace, tmp_path / "nan", use_delta=True, lr=1e30)
    assert 'class="state failed"' in page_of(tmp_path / "nan")
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedRun):
            train(workspace, tmp_path / "signal", use_delta=True)
    assert 'class="state interrupted"' in page_of(tmp_path / "signal")

    def fail() -> None:
        raise MemoryError("no more <memory>")

    after_step(monkeypatch, 2, fail)
    with pytest.raises(MemoryError):
        train(workspace, tmp_path / "other", use_delta=True)
    page = page_of(tmp_path / "other")
    assert 'class="state failed"' in page and "MemoryError: no more &lt;memory&gt;" in page
    assert Run(tmp_path / "other").events[-1]["finished"] is False


def test_a_resumed_run_shows_the_whole_of_it(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 2}
    train(workspace, tmp_path, max_steps=4, **flags)
    run = train(workspace, tmp_path, max_steps=7, resume=True, **flags)
    assert run.column("step", "samples") == run.column("step", "eval") == [0, 2, 4, 6, 7]
    page = page_of(tmp_path)
    for step in run.column("step"):
        assert f"<tr><td>{step}</td>" in page
    assert "all 5 evaluations" in page


def test_a_later_run_moves_it_with_the_others(workspace: Workspace, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(workspace, tmp_path, use_delta=True, max_steps=1, seed=seed)
    assert f"<code>{1}</code>" in page_of(tmp_path / f"{NAME}-previous")
    assert "<code>--seed</code></td><td><code>2</code>" in page_of(tmp_path)


@pytest.mark.slow
def test_curves_are_drawn_by_another_process(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 2}
    run = train(workspace, tmp_path, max_steps=4, report="curves", **flags)
    assert page_of(tmp_path).count("<svg") >= 4
    assert (tmp_path / f"{NAME}-loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{NAME}-loss.png" in run.files
    assert "matplotlib" not in {name.partition(".")[0] for name in sys.modules} or (
        "cpm_bee.report.draw" in sys.modules  # another test has drawn in this process
    )


def test_a_missing_or_failing_matplotlib_leaves_tables(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"use_delta": True, "max_steps": 3, "report": "curves"}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "can_draw", lambda: False)
        train(workspace, tmp_path / "missing", **flags)
    assert "pip install -e '.[report]'" in page_of(tmp_path / "missing")
    monkeypatch.setattr(drawing.sys, "executable", "/nowhere/python")
    train(workspace, tmp_path / "failing", **flags)
    page = page_of(tmp_path / "failing")
    assert "could not be drawn" in page and "/nowhere/python" in page


def test_a_drawing_is_not_followed_by_the_next_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def draw(self: drawing.Drawing, charts: dict[str, Any], step: int) -> None:
        started.append(step)
        self._drawn = drawing.Curves({}, b"", step)
        self._took = 100.0

    monkeypatch.setattr(drawing.Drawing, "_draw", draw)
    own = drawing.Drawing()
    own.begin({}, 1)  # nothing to draw
    own.begin({"loss": {}}, 2)
    assert own._thread is not None
    own._thread.join()
    curves = own.take()
    assert curves is not None and curves.step == 2 and own.take() is None
    own.begin({"loss": {}}, 3)
    assert started == [2]
    last = own.draw_now({"loss": {}}, 4)  # at the end it does not wait
    assert last is not None and last.step == 4 and started == [2, 4]


def test_a_log_of_another_version_can_be_shown(workspace: Workspace, tmp_path: Path) -> None:
    """Events and fields that are unknown or missing."""
    train(workspace, tmp_path, use_delta=True, max_steps=2)
    log = tmp_path / f"{NAME}-log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    odd = [
        {"event": "new", "step": 1},
        {"event": "eval", "step": -1},
        {"event": "train", "step": 1},
    ]
    log.write_text("\n".join([*map(json.dumps, odd), *lines]) + "\n", encoding="utf-8")
    train(workspace, tmp_path, use_delta=True, max_steps=3, resume=True)
    assert 'class="state finished"' in page_of(tmp_path)


def test_a_run_without_room_for_its_report_has_not_finished(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished one may take the place of an earlier run that is kept."""
    original = writer.ReportWriter.write_end

    def write_end(self: writer.ReportWriter) -> None:
        end = self._history.end
        if end is not None and end["finished"]:
            raise OSError(errno.ENOSPC, "No space left on device", "report.html")
        original(self)

    monkeypatch.setattr(writer.ReportWriter, "write_end", write_end)
    with pytest.raises(RunError, match=r"report\.html.*No space left"):
        train(workspace, tmp_path, use_delta=True, max_steps=2)
    [end] = Run(tmp_path).of("end")
    assert end["finished"] is False and 'class="state failed"' in page_of(tmp_path)


def test_a_fault_of_the_page_ends_no_training(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make_page(*_: Any, **__: Any) -> str:
        raise KeyError("a field")

    monkeypatch.setattr(writer, "make_page", make_page)
    run = train(workspace, tmp_path, use_delta=True, max_steps=2)
    assert run.column("step") == [1, 2]
    assert any("no report can be made of this log: KeyError" in m for m in caplog.messages)
    assert not (tmp_path / f"{NAME}-report.html").exists()
