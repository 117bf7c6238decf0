"""A forked Python process is like one that subprocess starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest
from support import ROOT

pytestmark = pytest.mark.skipif(
    os.environ.get("CPM_BEE_TEST_FORK") == "0", reason="NOT RUN: CPM_BEE_TEST_FORK=0 forks nothing"
)

STATE = """
import os, sys
print(ascii([sys.argv, sys.orig_argv, sys.path[:2], __name__, os.getcwd(), {**os.environ}]))
print(open("/proc/self/cmdline", "rb").read().rstrip(b"\\0").split(b"\\0"))
print(*sorted(os.listdir("/proc/self/fd")), os.umask(0))
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.name, stream.mode, stream.encoding, stream.errors, stream.line_buffering)
    print(type(stream.buffer), stream.write_through)
print(sys.stdin.read())
"""
SCRIPT = """
import atexit, sys, threading, time
from dataclasses import dataclass
@dataclass
class Found: path: str = __file__
thread = threading.Thread(target=lambda: (time.sleep(0.1), print("thread")))
thread.start()
atexit.register(lambda: print("at exit"))
print(Found(), sys.modules["__main__"].Found, "ü", flush=True)
print("not flushed", end="")
if sys.argv[1:]: sys.exit(int(sys.argv[1]))
"""
ENDS = [
    "pass",
    "import sys; sys.exit(3)",
    "import sys; sys.exit('a message')",
    "import sys; sys.exit(-1)",
    "def f():\n    1 / 0\nf()",
    "raise KeyboardInterrupt",
    "import os; os._exit(4)",
    "import os; os.kill(os.getpid(), 9)",
    "import os; os.abort()",
    "import signal, os; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)",
    "print(signal)",
]


@pytest.fixture(autouse=True)
def _buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def outcome(module: ModuleType, command: list[str], **options: Any) -> tuple[Any, ...]:
    done = module.run(
        [sys.executable, *command], capture_output=True, encoding="utf-8", timeout=100, **options
    )
    return done.returncode, done.stdout, done.stderr


def both(command: list[str], **options: Any) -> tuple[Any, ...]:
    """The outcome of a process, which is that of a forked one."""
    expected = outcome(subprocess, command, **options)
    assert outcome(forked, command, **options) == expected
    return expected


@pytest.mark.parametrize("code", ENDS)
def test_exit_status_and_what_is_printed(code: str) -> None:
    assert both(["-c", code])[0] == both(["-u", "-c", code])[0]


@pytest.mark.parametrize("flags", [["-c"], ["-u", "-c"]])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": ":replace"},
        {"PYTHONUNBUFFERED": "1", "NEW": "字"},
    ],
)
def test_the_state_that_a_process_begins_with(
    flags: list[str], values: dict[str, str], tmp_path: Path
) -> None:
    options = {"cwd": tmp_path, "env": {**os.environ, **values}, "input": "text\nof two lines"}
    assert "two lines" in both([*flags, STATE, "a", "字 b", ""], **options)[1]


@pytest.mark.parametrize("arguments", [[], ["7"]])
def test_a_script(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    status, output, _ = both(["script.py", *arguments], cwd=tmp_path)
    assert status == (7 if arguments else 0)
    assert output.splitlines()[1:] == ["not flushedthread", "at exit"]


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    assert both(["nothing.py"], cwd=tmp_path)[0] == 2


def test_a_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        for module in (subprocess, forked):
            command = [sys.executable, "-c", "print('x')"]
            done = module.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 120 and "No space left on device" in done.stderr


def test_modules_that_are_no_ours_are_not_those_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('another torch')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert both(["-c", "import torch"], env=env)[1] == "another torch\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    assert both(["-c", "import dataset_writer, sys; print(sys.path[1])"], env=env)[0] == 0


def test_it_has_imported_torch_and_is_a_child_with_its_own_signals() -> None:
    code = "import os, sys, time; print('torch' in sys.modules, os.getppid(), os.getsid(0))\n"
    code += "sys.stdout.flush(); time.sleep(100)"
    command = [sys.executable, "-c", code]
    for session in (False, True):
        process = forked.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=session
        )
        try:
            assert process.stdout is not None
            expected = process.pid if session else os.getsid(0)
            assert process.stdout.readline().split() == ["True", str(os.getpid()), str(expected)]
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.communicate() == ("", None)
            assert process.returncode == -signal.SIGTERM
        finally:
            process.kill()


def test_where_the_server_has_died_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = forked._Servers()
    monkeypatch.setattr(forked, "_servers", servers)
    code = "import sys; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert forked.run(command, capture_output=True, text=True).stdout == "True\n"
    [server] = servers._servers.values()
    assert server is not None
    os.kill(server._pid, signal.SIGKILL)
    for _ in range(2):
        assert forked.run(command, capture_output=True, text=True).stdout == "False\n"


def test_what_it_leaves_is_not_ours(tmp_path: Path) -> None:
    """An orphan of a forked process falls to init, not to this process."""
    code = "import os, sys, time\nif os.fork() == 0:\n    time.sleep(0.3); os.close(1)\n"
    code += "    open(sys.argv[1], 'w').write(str(os.getppid()))"
    assert forked.run([sys.executable, "-c", code, str(tmp_path / "parent")]).returncode == 0
    deadline = time.monotonic() + 60
    while not (tmp_path / "parent").exists() or not (tmp_path / "parent").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert int((tmp_path / "parent").read_text()) != os.getpid()


def test_workers_of_torchrun_are_forked_too(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(
        "import os, sys; print(os.environ['RANK'], 'torch' in sys.modules, flush=True)\n"
        "sys.exit(int(os.environ['RANK']) * 5)"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = forked.run(
        [*command, "worker.py"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 True"]
    assert "exitcode  : 5" in done.stderr
