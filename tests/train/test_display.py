from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest

from cpm_bee.train.display import Display, shown_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(display: Display, steps: int, *, skipped: int | None = None) -> None:
    for step in range(1, steps + 1):
        values: dict[str, Any] = {
            "step": step, "epoch": 0, "loss": 3 / step, "lr": 0.1, "grad_norm": 1.0,
            "loss_scale": 1.0, "tokens_per_second": 100.0,
        }  # fmt: skip
        display.step(values, seconds=0.1, row_fill=0.9, skipped=step == skipped, done=step / steps)
    display.close()


def test_elsewhere_there_is_a_line_every_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    show(Display(10, 2), 25, skipped=13)
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.findall(r"Iter: +(\d+)", line)[0]) for line in lines] == [1, 10, 13, 20]
    assert [line for line in lines if "overflow" in line] == [lines[2]]
    assert lines[0].endswith("| left: ? |") and lines[1].endswith("| left: 0:00:00 |")


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output, errors = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    display = Display(1, 2)
    display.line("above")
    show(display, 30)
    assert output.getvalue() == "above\n"
    assert "epoch 1/2, step 1:" in errors.getvalue() and "? left, loss 3.0000" in errors.getvalue()


@pytest.mark.parametrize("terminal", ["stdout", "stderr"])
def test_lines_are_written_to_a_file_even_beside_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: str
) -> None:
    """`> log.txt`, and `2> errors.txt`."""
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, terminal, stream)
        show(Display(1, 1), 3)
    printed = stream.getvalue() if terminal == "stdout" else capsys.readouterr().out
    assert printed.count("Iter:") == 3


def test_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the share that is done; a resumed run counts its own time, and not its first step."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(1, 1)
    values = {
        "step": 51, "epoch": 0, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "loss_scale": 1.0,
        "tokens_per_second": 1.0,
    }  # fmt: skip
    for done, at in ((0.5, 0.0), (0.6, 600.0), (0.7, 1200.0), (1.0, 2000.0)):
        now[0] = at
        display.step(values, seconds=1.0, row_fill=1.0, skipped=False, done=done)
    left = re.findall(r"left: (\S+)", capsys.readouterr().out)
    assert left == ["?", "0:40:00", "0:30:00", "0:00:00"]
    assert shown_seconds(3 * 3600 + 62.4) == "3:01:02"
