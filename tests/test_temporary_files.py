"""Temporary files of processes that were killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import support
import train_support

from cpm_bee.files import atomic_file
from cpm_bee.temporary_files import abandoned_bytes, own_host, temporary_name

HOUR, DAYS = 3600, 2 * 24 * 3600

HOLD = """
import sys, time
from pathlib import Path
from cpm_bee.files import atomic_file
with atomic_file(Path(sys.argv[1]), "wb") as file:
    file.write(b"x" * 100)
    file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return forked.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(support.ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )


def write_one(folder: Path) -> None:
    with atomic_file(folder / "other.txt") as file:
        file.write("x")


def left(folder: Path, owner: str, *, age: float = 0) -> Path:
    path = folder / f".state.pt.partial-{owner}"
    path.write_bytes(b"half")
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path / "state.pt")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (path,) = tmp_path.glob(".state.pt.partial-*")
    assert path.name == temporary_name("state.pt").replace(str(os.getpid()), str(process.pid))
    write_one(tmp_path)
    assert path.exists() and abandoned_bytes(tmp_path) == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert abandoned_bytes(tmp_path) == 100
    write_one(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["other.txt"]


def test_a_process_number_that_is_in_use_again_keeps_nothing(tmp_path: Path) -> None:
    for pid in (os.getpid(), os.getppid(), 1):
        left(tmp_path, f"{pid}-{own_host()}")
    write_one(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["other.txt"]


def test_another_machines_file_stays_for_a_day(tmp_path: Path) -> None:
    """Its lock may not be known here. The same for files of earlier versions, without a lock."""
    for owner in ("999999-elsewhere", "999999"):
        fresh = left(tmp_path, owner, age=HOUR)
        write_one(tmp_path)
        assert fresh.exists()
        old = left(tmp_path, owner, age=DAYS)
        with open(old, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            write_one(tmp_path)
            assert old.exists()
        write_one(tmp_path)
        assert not old.exists()


def test_without_locks_only_the_old_file_of_an_ended_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [
        left(tmp_path, f"{ended.pid}-{own_host()}", age=HOUR),
        left(tmp_path, f"{os.getpid()}-{own_host()}", age=DAYS),
    ]
    write_one(tmp_path)
    assert all(path.exists() for path in kept)
    old = left(tmp_path, f"{ended.pid}-{own_host()}", age=DAYS)
    write_one(tmp_path)
    assert not old.exists() and kept[1].exists()


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    names = [".x.partial", ".x.partial-", ".x.partial-abc", "x.partial-1", "a.partial-1-host"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.partial-1-{own_host()}").mkdir()
    (tmp_path / f".link.partial-1-{own_host()}").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    write_one(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "other.txt"])


def test_long_names(tmp_path: Path) -> None:
    names = ["x" * 255, "春" * 85, "春" * 84 + "夏", "x" * 150]
    assert len({temporary_name(name) for name in names}) == 4
    for name in names:
        assert len(os.fsencode(temporary_name(name))) <= 255
        with atomic_file(tmp_path / name) as file:
            file.write("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


WRITE_MANY = """
import sys
from pathlib import Path
from cpm_bee.files import atomic_file
for number in range(150):
    with atomic_file(Path(sys.argv[1]) / f"{sys.argv[2]}-{number % 3}") as file:
        file.write(str(number))
"""


def test_processes_that_write_side_by_side_remove_nothing_of_each_other(tmp_path: Path) -> None:
    processes = [start(WRITE_MANY, tmp_path, number) for number in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {f"{n}-{i}": str(147 + i) for n in range(4) for i in range(3)}


def test_a_run_removes_them_at_its_start(tmp_path: Path) -> None:
    """Also where it writes to a folder of its own first, beside an earlier run."""
    workspace = train_support.make_workspace(tmp_path / "data")
    flags = {"use_delta": True, "max_steps": 1}
    with train_support.one_thread():
        train_support.train(workspace, tmp_path / "run", **flags)
        state = left(tmp_path / "run", f"1-{own_host()}")
        train_support.train(workspace, tmp_path / "run", **flags, dry_run=True)
        assert state.exists()
        train_support.train(workspace, tmp_path / "run", **flags)
    assert not state.exists()


HOLD_FOLDER = """
import runpy, sys
module = runpy.run_path(sys.argv[1])
from pathlib import Path
with module["shared_folder"](Path(sys.argv[2]), []):
    print("ready", flush=True)
    input()
"""


def test_data_reformat_does_the_same(tmp_path: Path, run_script: Callable) -> None:
    script = "tutorials/basic_task_finetune/data_reformat.py"
    (tmp_path / "raw").mkdir()
    line = '{"translation": "a", "choices": ["b", "c"], "answer": 0}\n'
    (tmp_path / "raw" / "train.jsonl").write_text(line)
    output = tmp_path / "bee"
    output.mkdir()
    dead = output / f".train.jsonl.partial-1-{own_host()}"
    elsewhere = output / ".train.jsonl.partial-1-elsewhere"
    for path in (dead, elsewhere):
        path.write_text("half")
    command = (script, "--input", tmp_path / "raw", "--output", output)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_FOLDER, str(support.ROOT / script), str(output)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert run_script(*command).returncode == 0
    assert dead.exists()  # it may be that of the process that writes now
    process.communicate("\n")
    assert run_script(*command).returncode == 0
    assert sorted(p.name for p in output.iterdir()) == [elsewhere.name, "train.jsonl"]
