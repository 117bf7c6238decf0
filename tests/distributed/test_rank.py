"""Which rank reports an error, and what torchrun is told."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import train_support

from cpm_bee.distributed import rank

PROGRAM = """
import os, sys, time
from cpm_bee.cli import run_command
from cpm_bee.distributed import rank
from cpm_bee.errors import InputError

rank._PATIENCE = 1.0

def main():
    if sys.argv[1] == os.environ["RANK"]:
        raise InputError("vocab.txt is missing here")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError("a bug")
    time.sleep(60)

run_command(main)
"""


@pytest.fixture(autouse=True)
def nothing_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "lost_ranks", set())


def place(monkeypatch: pytest.MonkeyPatch, own: int, local_rank: int, world_size: int) -> None:
    values = {"RANK": own, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_the_lowest_rank_left_on_a_machine_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 6, 2, 8)
    assert not rank.is_reporting_rank()
    rank.lost_ranks.update({1, 4})
    assert not rank.is_reporting_rank()
    rank.lost_ranks.add(5)
    assert rank.is_reporting_rank()


def test_a_rank_names_itself_and_waits_for_the_one_that_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    place(monkeypatch, 0, 0, 4)
    rank.report_error("bad")
    assert capsys.readouterr().err == "error: bad\n" and waits == []
    place(monkeypatch, 3, 1, 4)
    rank.report_error("bad")
    assert waits == [rank._PATIENCE]
    assert capsys.readouterr().err.startswith("error: rank 3 on ")
    monkeypatch.setattr(rank, "is_terminating", True)  # torchrun waits for this process
    rank.report_error("bad")
    assert capsys.readouterr().err == "" and waits == [rank._PATIENCE]


def run_program(tmp_path: Path, argument: str) -> str:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = train_support.command(argument, ranks=2, script=script)
    path = os.pathsep.join(sys.path)
    values = {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    status, _, errors = train_support.finish(train_support.start(command, tmp_path, **values))
    assert status == 1
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_error_of_one_rank_is_reported_once(tmp_path: Path, number: int) -> None:
    errors = run_program(tmp_path, str(number))
    begin = "error: rank 1 on " if number else "error: vocab.txt"
    assert errors.startswith(begin) and errors.count("error: ") == 1
    report = errors.partition("Root Cause")[2]
    assert f"rank      : {number} " in report and "exitcode  : 2" in report
    assert "traceback : vocab.txt is missing here" in report
    assert 'program.py", line' not in errors  # as in a traceback of ours


@pytest.mark.slow
def test_a_bug_has_its_traceback_in_the_report(tmp_path: Path) -> None:
    report = run_program(tmp_path, "bug").partition("Root Cause")[2]
    assert 'program.py", line' in report and "ZeroDivisionError: a bug" in report
