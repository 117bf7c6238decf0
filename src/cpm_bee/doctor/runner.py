"""Runs steps one after the other, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpm_bee.doctor.facts import SRC
from cpm_bee.doctor.report import FAULT, NOT_AVAILABLE, Finding, padded, worst
from cpm_bee.doctor.steps import TOTAL_SECONDS, Step
from cpm_bee.language import said
from cpm_bee.progress import print_above_bar

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_SHOWN = 4000  # characters of a failed step's output
_PATIENCE_ON_CPU = 3  # a CPU has other work, and its steps have less to do


@dataclass
class StepResult:
    """How a step ended: its lines, and a fault of the step itself."""

    step: Step
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    lines: list[dict[str, str]] = field(default_factory=list)
    output: str = ""  # of a step that failed

    def finding(self, say: Callable[[str], str] = str) -> Finding:
        """Returns its line of a table.

        Args:
            say: translates a part of the text; English without it.
        """
        if self.reason:
            text = say(self.reason)
        elif self.verdict == FAULT:
            shown = [line for line in self.lines if line["verdict"] == self.verdict]
            parts = [f"{line['what']}: {line['text']}" for line in shown if line["text"]]
            text = "; ".join(parts[:3])
        else:
            verdicts = [line["verdict"] for line in self.lines]
            counts = {v: verdicts.count(v) for v in dict.fromkeys(verdicts)}
            text = ", ".join(say(f"{n} {v}") for v, n in counts.items())
            text = f"{say(self.step.title)}: {text}"
        return Finding(self.step.name, self.verdict, f"{text} ({self.seconds:.0f} s)")

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step.name,
            "verdict": self.verdict,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "lines": self.lines,
            "output": self.output,
        }


def run_steps(
    steps: Sequence[Step], device: str, cards: int, total: float = TOTAL_SECONDS
) -> list[StepResult]:
    """Run steps in order and print the lines of each.

    Args:
        cards: the number of cards that PyTorch sees.
        total: the number of seconds for all steps; those that it does not reach are not run.
    """
    begin = time.monotonic()
    results = []
    for step in steps:
        left = total - (time.monotonic() - begin)
        verdict = step.unmet(device, cards)
        if verdict:
            result = StepResult(step, verdict, reason=step.title)
        elif left < 1:
            reason = f"not run: the {total:.0f} seconds of all steps are over"
            result = StepResult(step, NOT_AVAILABLE, reason=reason)
        else:
            limit = step.seconds * (_PATIENCE_ON_CPU if device == "cpu" else 1)
            result = run_step(step, device, min(limit, left))
        results.append(result)
        print_above_bar("\n".join(_shown(result)))
    return results


def _shown(result: StepResult) -> list[str]:
    verdict, reason = said(result.verdict), said(result.reason)
    lines = [f"{result.step.name}: {verdict} ({result.seconds:.1f} s) {reason}".rstrip()]
    for line in result.lines:
        lines.append(f"    {padded(said(line['verdict']), 8)}  {line['what']}: {line['text']}")
    if result.verdict == FAULT and result.output:
        lines += [f"    | {line}" for line in result.output.splitlines()[-15:]]
    return lines


def run_step(step: Step, device: str, limit: float) -> StepResult:
    """Run one step; whatever it does, this returns soon after the limit."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        with open(Path(folder, "output"), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cpm_bee.doctor.child", step.function, device, folder],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment() | dict(step.variables),
            )
            try:
                status = process.wait(limit)
                reason = _reason(status)
            except subprocess.TimeoutExpired:
                reason = f"still running after its limit of {limit:.0f} seconds, and was ended"
            finally:
                end_processes(process)
        lines = _read_lines(Path(folder))
        text = Path(folder, "output").read_text(encoding="utf-8", errors="replace").strip()
    if reason and text and "signal" not in reason and "limit" not in reason:
        reason = f"{text.splitlines()[-1][:300]} ({reason})"
    if not reason and not lines:
        reason = "the step has checked nothing"
    verdict = FAULT if reason else worst(line["verdict"] for line in lines)
    kept = text[-_SHOWN:] if verdict == FAULT else ""
    return StepResult(step, verdict, reason, time.monotonic() - begin, lines, kept)


def _environment() -> dict[str, str]:
    """The environment of a step: without what an outer torchrun has set."""
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    path = [str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _reason(status: int) -> str:
    if status == 0:
        return ""
    if status > 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"died by signal {name}"


def _read_lines(folder: Path) -> list[dict[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        lines: list[dict[str, str]] = json.loads((folder / "result.json").read_text("utf-8"))
        return lines
    return []


def end_processes(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, politely at first; returns when they are gone."""
    started = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    if process.poll() is None:
        started |= descendants(process.pid)
        process.kill()
        process.wait()
    # Another process may have got the same id by now: it began at another time.
    left = [pid for pid, (_, start) in _processes().items() if started.get(pid) == start]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE
    while any(map(is_running, left)) and time.monotonic() < deadline:
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, int]:
    """All processes that descend from a process: ids, and when they began."""
    processes = _processes()
    found: dict[int, int] = {}
    level = {pid}
    while level:
        level = {p for p, (parent, _) in processes.items() if parent in level} - found.keys()
        found |= {p: processes[p][1] for p in level}
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie, which waits for its parent alone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _processes() -> dict[int, tuple[int, int]]:
    """The parent and the start time of each process of this machine (Linux)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # pid (name) state parent ..., see man 5 proc
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            found[int(path.parent.name)] = int(fields[1]), int(fields[19])
    return found
