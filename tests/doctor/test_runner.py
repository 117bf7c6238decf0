"""A step that goes wrong, in whatever way, is a fault, and ends no other step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import ROOT

from cpm_bee.doctor import runner
from cpm_bee.doctor.report import FAULT, NEEDS_CUDA, NEEDS_GPUS, NOT_AVAILABLE, OK, exit_status
from cpm_bee.doctor.steps import STEPS, Step, TwoProcesses

pytestmark = pytest.mark.slow  # each step is a process that loads torch


def run(name: str, monkeypatch: pytest.MonkeyPatch, limit: float = 60) -> runner.StepResult:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return runner.run_step(Step(name, "a test", 60, f"doctor_faults:{name}"), "cpu", limit)


def test_a_good_step(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("good", monkeypatch)
    assert (result.verdict, result.reason) == (OK, "")
    assert [line["verdict"] for line in result.lines] == [OK, NEEDS_CUDA]
    assert "1 ok, 1 needs CUDA" in result.finding().text
    assert result.output == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrong", "two: 3 instead of 2"),
        ("raises", "ValueError: the reason of this failure (ended with status 1)"),
        ("dies", "died by signal SIGSEGV"),
        ("checks_nothing", "the step has checked nothing"),
    ],
)
def test_faults(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are faults although the lines before them are right."""
    result = run(name, monkeypatch)
    assert result.verdict == FAULT
    assert told in result.finding().text
    assert exit_status([result.finding()]) == 1
    if name != "checks_nothing":
        assert result.lines[0]["verdict"] == OK


def test_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended with all that it started, even if it ignores SIGTERM."""
    monkeypatch.setattr(runner, "_GRACE", 1.0)
    begin = time.monotonic()
    limit = 8.0
    result = run("hangs", monkeypatch, limit)
    while len(result.lines) < 2:  # the machine was too busy to get there
        limit *= 2
        begin = time.monotonic()
        result = run("hangs", monkeypatch, limit)
    assert time.monotonic() - begin < limit + 10
    assert result.verdict == FAULT
    assert f"still running after its limit of {limit:.0f} seconds" in result.finding().text
    assert not runner.is_running(int(result.lines[1]["text"]))


def test_what_cannot_run_is_not_ok(capsys: pytest.CaptureFixture[str]) -> None:
    cuda = Step("flex", "a test", 60, "nothing:nothing", NEEDS_CUDA)
    two = TwoProcesses("ddp", "a test", 60, "nothing:nothing")
    assert [r.verdict for r in runner.run_steps([cuda], "cpu", 0)] == [NEEDS_CUDA]
    assert [r.verdict for r in runner.run_steps([two], "cuda", 1)] == [NEEDS_GPUS]
    assert two.unmet("cpu", 0) == two.unmet("cuda", 2) == cuda.unmet("cuda", 1) == ""
    late = Step("late", "a test", 60, "nothing:nothing")
    (result,) = runner.run_steps([late], "cpu", 0, total=0)
    assert result.verdict == NOT_AVAILABLE and "seconds of all steps are over" in result.reason
    assert "needs CUDA" in capsys.readouterr().out


def test_functions_of_all_steps_exist() -> None:
    for step in STEPS:
        module, _, name = step.function.partition(":")
        source = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
        assert f"def {name}(context: Context)" in source.read_text(encoding="utf-8"), step
