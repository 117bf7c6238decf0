"""The files of a run: one writer."""

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

import forked
import pytest
import tiny
from support import ROOT

from cpm_bee.errors import InputError
from cpm_bee.files import BusyError, exclusive
from cpm_bee.train.checkpoints import RunFiles, RunProvenance


def files_of(folder: Path) -> RunFiles:
    return RunFiles(
        str(folder), "run", RunProvenance(tiny.make_config(), "vocab", "base", "", "", None)
    )


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
    holder = forked.Popen(
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
        assert timer.finished.is_set()
    timer.join()


def test_the_lock_of_a_run_names_what_to_do(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with files.lock():
        before = time.monotonic()
        with pytest.raises(InputError, match="give another --save-name"), files.lock():
            pass
        assert time.monotonic() - before < 5
    assert list(tmp_path.iterdir()) == []


def test_states_are_listed_latest_first(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    assert files.states() == []
    for name in ("run-state-9.pt", "run-state-100.pt", "run-state-x.pt", "run-2-state-7.pt"):
        (tmp_path / name).touch()
    listed = [path.name for path in files.states()]
    assert listed == ["run-state-100.pt", "run-state-9.pt"]
    files.state.touch()
    assert [path.name for path in files.states()] == ["run-state.pt", *listed]
