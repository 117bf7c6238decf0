"""The files of a run: one writer, and an earlier run that is never lost halfway."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from support import ROOT

from cpm_bee.errors import InputError
from cpm_bee.files import BusyError, exclusive
from cpm_bee.train.checkpoints import RunFiles, RunProvenance

NAMES = ("run-delta-best.pt", "run-delta-best.json", "run-delta-last.pt", "run-state.pt")


def files_of(folder: Path) -> RunFiles:
    return RunFiles(
        str(folder), "run", RunProvenance(tiny.make_config(), "vocab", "base", "", "", None)
    )


def write_run(folder: Path, text: str) -> None:
    for name in NAMES:
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()} if folder.is_dir() else {}


def test_the_files_of_a_run_are_moved_and_those_of_the_one_before_removed(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    assert files.archive_previous() is None
    for text in ("first", "second"):
        write_run(tmp_path, text)
        assert files.archive_previous() == files.previous
        assert contents(files.previous) == dict.fromkeys(NAMES, text)
        assert list(tmp_path.iterdir()) == [files.previous]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operation", range(8))
def test_a_kill_between_two_operations_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """Whatever the moment, the next start has all files of the run, and no mixture."""
    files = files_of(tmp_path)
    write_run(tmp_path, "older")
    files.archive_previous()
    write_run(tmp_path, "newer")
    count = 0
    for name in ("rename", "mkdir"):
        original = getattr(Path, name)

        def counted(self: Path, *args: object, original=original, **options: object):  # type: ignore[no-untyped-def]
            nonlocal count
            if count == operation:
                raise Killed
            count += 1
            return original(self, *args, **options)

        monkeypatch.setattr(Path, name, counted)
    try:
        files.archive_previous()
        assert operation >= count
    except Killed:
        pass
    monkeypatch.undo()
    files.archive_previous()
    assert contents(files.previous) == dict.fromkeys(NAMES, "newer")
    assert list(tmp_path.iterdir()) == [files.previous]


HOLD = """
import sys, time
from cpm_bee.files import exclusive
with exclusive(sys.argv[1], "is busy"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / ".run.lock"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as caught, exclusive(path, "is busy"):
            pass
        assert re.fullmatch(rf"process {holder.pid} on \S+ is busy", str(caught.value))
        assert isinstance(caught.value, InputError)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(2):
        with exclusive(path, "is busy"):
            assert path.exists()
        assert not path.exists()


def test_a_dry_run_sees_the_lock_and_leaves_it_alone(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    files.refuse_if_locked()
    assert list(tmp_path.iterdir()) == []
    with files.lock():
        for _ in range(2):
            told = rf"process {os.getpid()} on \S+ is writing .*give another --save-name"
            with pytest.raises(InputError, match=told):
                files.refuse_if_locked()
    (tmp_path / ".run.lock").write_text("process 1 on a machine, killed")
    files.refuse_if_locked()
    with files.lock():
        pass


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """As a dry run holds it while it looks."""
    path = tmp_path / ".run.lock"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    timer = threading.Timer(0.08, os.close, [descriptor])
    timer.start()
    with exclusive(path, "is busy"):
        pass
    timer.join()


def test_the_lock_of_a_run_names_what_to_do(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with files.lock():
        before = time.monotonic()
        with pytest.raises(InputError, match="give another --save-name"), files.lock():
            pass
        assert time.monotonic() - before < 5
    assert list(tmp_path.iterdir()) == []
