"""finetune_cpm_bee.py as a user starts it: one process or several, killed, wrong."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import train_support
from support import ROOT
from train_support import Run, Workspace, command, distance, finish, start

NAME = "cpm_bee_finetune"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    with train_support.one_thread():
        return train_support.make_workspace(tmp_path_factory.mktemp("workspace"), dropout=0.2)


def run(flags: list[str], cwd: Path, **values: str) -> tuple[int, str, str]:
    return finish(start(command(*flags), cwd, **values))


def wait_for_step(process: subprocess.Popen[str], save: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    log = save / f"{NAME}-log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and f'"train", "step": {step},' in log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def long_run(workspace: Workspace, save: Path, **values: Any) -> list[str]:
    """More epochs than a test would wait for, a state at every third step."""
    return workspace.flags(save, **{"epoch": 10_000, "save_interval": 3, **values})


@pytest.mark.parametrize("use_delta", [True, False])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    workspace: Workspace, tmp_path: Path, use_delta: bool
) -> None:
    flags = {"use_delta": use_delta, "delta_dropout": 0.1}
    killed = start(command(*long_run(workspace, tmp_path / "killed", **flags)), tmp_path)
    wait_for_step(killed, tmp_path / "killed", 7)
    os.kill(killed.pid, signal.SIGKILL)
    finish(killed)
    last = Run(tmp_path / "killed").column("step")[-1]
    with open(tmp_path / "killed" / f"{NAME}-log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event": "train", "st')  # as a kill within a write leaves it
    flags |= {"max_steps": last + 4, "epoch": 10_000, "save_interval": 3}
    with train_support.one_thread():
        resumed = train_support.train(workspace, tmp_path / "killed", resume=True, **flags)
        whole = train_support.train(workspace, tmp_path / "whole", **flags)
    assert resumed.column("step") == list(range(1, last + 5))
    losses = {e["step"]: e["loss"] for e in resumed.of("train")}
    assert list(losses.values()) == pytest.approx(whole.losses, rel=1e-6)
    assert distance(resumed.weights(), whole.weights()) < 1e-6
    left = [n for n in resumed.files if n not in whole.files]
    assert all("partial" in name for name in left)  # at most what the killed write left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_75(
    workspace: Workspace, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(command(*long_run(workspace, tmp_path / "run", use_delta=True)), tmp_path)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(number)
    status, output, errors = finish(process)
    ended = Run(tmp_path / "run")
    step = ended.events[-1]["step"]
    assert status == 75
    reason = f"interrupted after step {step}; the same command with --resume goes on from there"
    assert errors == f"error: {reason} (explain: E509)\n"
    assert ended.reason == reason and ended.column("step")[-1] == step
    assert f"training ended after {step} steps" in output
    with train_support.one_thread():
        resumed = train_support.train(
            workspace, tmp_path / "run", use_delta=True, resume=True, max_steps=step + 1
        )
    assert resumed.column("step") == list(range(1, step + 2))


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(workspace: Workspace, tmp_path: Path) -> None:
    """As `| head -3` does: the run goes on, and its log has all of it."""
    flags = workspace.flags(tmp_path / "run", use_delta=True, max_steps=6)
    words = " ".join(map(shlex.quote, command(*flags)))
    done = subprocess.run(
        ["bash", "-c", f"{words} | head -3; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert Run(tmp_path / "run").column("step") == list(range(1, 7))


@pytest.mark.slow
def test_wrong_input_is_one_message_and_debug_shows_the_traceback(
    workspace: Workspace, tmp_path: Path
) -> None:
    missing = {"load": "no-model", "eval_dataset": "no-data", "vocab": "no-vocab"}
    flags = workspace.flags(Path("results"), use_delta=True, **missing)
    status, output, errors = run(flags, tmp_path)
    assert (status, output) == (2, "")
    first, *rest = errors.splitlines()
    assert first == "error: this run cannot start: (explain: E201)"
    assert len(rest) == len(missing)
    assert all(any(name in line for line in rest) for name in missing.values())
    status, _, errors = run([*flags, "--debug"], tmp_path)
    assert status == 1 and errors.startswith("Traceback") and "no-model" in errors
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    for flags, expected in ((["--help"], 0), (["--lr", "high"], 2), ([], 2)):
        status, output, errors = run(flags, tmp_path, PYTHONPATH=str(tmp_path))
        assert status == expected
        assert ("usage:" in output) if expected == 0 else errors.startswith("error: ")
        assert "Traceback" not in errors


def living(word: str) -> list[str]:
    """Living processes with a word on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def check_torchrun_ended(
    process: subprocess.Popen[str], errors: str, expected: str, tmp_path: Path
) -> None:
    """One error line of ours beside torchrun's own report, and no process left."""
    assert process.returncode == 1
    assert errors.count("error: ") == 1 and expected in errors
    assert str(ROOT / "src" / "cpm_bee") not in errors  # as in a traceback of ours
    deadline = time.monotonic() + 60
    while living(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(str(tmp_path)) == []


@pytest.fixture
def own_tmp(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp")}


@pytest.mark.slow
def test_four_processes_without_a_checkpoint(
    workspace: Workspace, tmp_path: Path, own_tmp: dict[str, str]
) -> None:
    flags = workspace.flags(tmp_path / "run", use_delta=True, load=tmp_path / "no-model")
    process = start(command(*flags, ranks=4), tmp_path, **own_tmp)
    _, output, errors = finish(process)
    check_torchrun_ended(process, errors, "no such checkpoint", tmp_path)
    assert output == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tmp"]


@pytest.mark.slow
def test_an_error_of_the_first_process_alone(
    workspace: Workspace, tmp_path: Path, own_tmp: dict[str, str]
) -> None:
    # Only the first one makes the index, and finds the record; the other waits for it.
    dataset = train_support.make_dataset(tmp_path, "bad", [{"input": "<no>", "<ans>": "b"}])
    flags = workspace.flags(tmp_path / "run", use_delta=True, dataset=dataset)
    process = start(command(*flags, ranks=2), tmp_path, **own_tmp)
    _, _, errors = finish(process)
    check_torchrun_ended(process, errors, "special token <no>", tmp_path)
    assert sorted(p.name for p in dataset.iterdir()) == ["checksums.json", "data", "meta.bin"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(
    workspace: Workspace, tmp_path: Path, own_tmp: dict[str, str]
) -> None:
    save = tmp_path / "run"
    flags = long_run(workspace, save, use_delta=True, save_interval=10_000)
    process = start(command(*flags, ranks=2), tmp_path, **own_tmp)
    wait_for_step(process, save, 2)
    process.terminate()
    _, _, errors = finish(process)
    check_torchrun_ended(process, errors, "interrupted after step", tmp_path)
    ended = Run(save)
    assert ended.reason.startswith("interrupted after step")
    with train_support.one_thread():
        steps = ended.events[-1]["step"]
        resumed = train_support.train(
            workspace, save, use_delta=True, resume=True, batch_size=8, max_steps=steps + 1,
            epoch=10_000,
        )  # fmt: skip
    assert resumed.column("step") == list(range(1, steps + 2))
