"""Which process has ended is found out, in one process that plays the others."""

from __future__ import annotations

import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import train_support

from cpm_bee.distributed import heartbeat, process_group, rank
from cpm_bee.distributed.heartbeat import Heartbeat
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import RunError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "_SILENCE", 0.4)
    port = train_support.free_port()
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def nothing_lost() -> Iterator[None]:
    rank.lost_ranks.clear()
    yield
    rank.lost_ranks.clear()


def register(store: dist.Store, rank: int, *, machine: str, number: int) -> None:
    other = dist.PrefixStore("heartbeat", store)
    other.set(f"process/{rank}", f"{machine}\nhost-of-{rank}\n{number}")
    other.add(f"beat/{rank}", 1)


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_of_this_machine_is_missed_at_once(store: dist.Store) -> None:
    own = Heartbeat(store, 0, 3, nccl=False)
    machine = own._own.machine
    register(store, 1, machine=machine, number=os.getppid())
    number = ended_process()
    register(store, 2, machine=machine, number=number)
    assert own.explain_failure() == (
        f"rank 2 of this run has ended (process {number} on host-of-2 is gone)"
    )
    assert rank.lost_ranks == {2}
    own.close(None)


def test_a_process_elsewhere_is_missed_by_its_silence(store: dist.Store) -> None:
    own = Heartbeat(store, 0, 2, nccl=False)
    register(store, 1, machine="elsewhere", number=1)
    found = own.explain_failure()
    assert found is not None and "rank 1 " in found and "no heartbeat" in found
    own.close(None)


def test_processes_that_live_are_not_missed(store: dist.Store) -> None:
    first, second = (Heartbeat(store, r, 2, nccl=False) for r in (0, 1))
    second._own = second._own._replace(machine="elsewhere")
    register(store, 1, machine="elsewhere", number=1)
    assert first.explain_failure() is None
    second.close(None)  # ends well, and is silent from now on
    assert first.explain_failure() is None
    first.close(None)
    assert rank.lost_ranks == set()


def test_the_reason_of_a_failed_process_reaches_the_others(store: dist.Store) -> None:
    first, second = (Heartbeat(store, r, 2, nccl=False) for r in (0, 1))
    second.close("no room left")
    rank.lost_ranks.clear()  # those of the process that failed
    assert first.explain_failure() == "rank 1 has ended: no room left"
    assert rank.lost_ranks == {1}
    first.close(None)


@pytest.mark.parametrize("first", ["main", "heartbeat"])
def test_one_thread_reports_a_loss_with_nccl(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Heartbeat, "_end_process", lambda self, cause: ended.append(cause))
    monkeypatch.setattr(heartbeat, "_NCCL_PAUSE", 0.02)
    monkeypatch.setattr(heartbeat, "_GRACE", 0.3)
    own = Heartbeat(store, 0, 2, nccl=True)
    if first == "main":
        own.explain_failure()  # finds nothing yet
    register(store, 1, machine=own._own.machine, number=ended_process())
    while first == "heartbeat" and not ended:
        time.sleep(0.01)
    begin = time.monotonic()
    cause = own.explain_failure()
    assert cause is not None and "rank 1 of this run has ended" in cause
    if first == "main":
        assert ended == []
    else:  # the main thread waits to be ended
        assert time.monotonic() - begin > 2 * 0.3 and ended[0] == cause
    own.close(None)


def test_a_rank_that_has_reported_an_error_leaves_time_for_the_others_with_nccl(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have the same error, with an exit status of its own."""
    ended: list[float] = []
    monkeypatch.setattr(
        Heartbeat, "_end_process", lambda self, cause: ended.append(time.monotonic())
    )
    monkeypatch.setattr(heartbeat, "_NCCL_PAUSE", 0.02)
    monkeypatch.setattr(heartbeat, "_GRACE", 0.5)
    first, second = (Heartbeat(store, r, 2, nccl=True) for r in (0, 1))
    begin = time.monotonic()
    second.close("no such file")
    while not ended:
        time.sleep(0.01)
    assert ended[0] - begin > 0.5
    first.close(None)


HANGING = """
import sys, time
import torch.distributed as dist
from cpm_bee.distributed import heartbeat
nccl = sys.argv[2] == "nccl"
heartbeat._INTERVAL, heartbeat._GRACE = 0.1, 1000 if nccl else 0.1
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
own = heartbeat.Heartbeat(store, 0, 2, nccl=nccl)
process_store = dist.PrefixStore("heartbeat", store)
process_store.set("process/1", own._own.machine + "\\nhost\\n" + sys.argv[1])
process_store.add("beat/1", 1)
time.sleep(60)
"""


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_process_that_waits_for_a_lost_one_is_ended(backend: str) -> None:
    """With NCCL at once: the main thread cannot leave the collective by itself."""
    begin = time.monotonic()
    done = forked.run(
        [sys.executable, "-c", HANGING, str(ended_process()), backend],
        env=train_support.environment(PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1
    assert "error: rank 1 of this run has ended" in done.stderr
    assert time.monotonic() - begin < 30


FROZEN = """
import os, signal, torch
import torch.distributed as dist
from cpm_bee.cli import run_command
from cpm_bee.distributed import heartbeat, process_group

heartbeat._INTERVAL, heartbeat._LONG_SILENCE, heartbeat._GRACE = 0.2, 4.0, 0.5

def main():
    process_group.join(torch.device("cpu"))
    dist.barrier()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    with process_group.exchange():
        dist.barrier()

run_command(main)
"""


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_torchrun_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)
    path = os.pathsep.join(sys.path)
    command = train_support.command(ranks=3, script=script)
    process = train_support.start(command, tmp_path, PYTHONPATH=path, TMPDIR=str(tmp_path))
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "closing signal SIGTERM" in line:
            break
    named = re.match(r"error: rank 1 of this run has ended \(process (\d+) on ", lines[0])
    assert named, lines
    os.kill(int(named[1]), signal.SIGCONT)  # else torchrun waits 30 seconds before SIGKILL
    status, _, errors = train_support.finish(process)
    assert status == 1 and "error: " not in errors
    assert "no heartbeat for 4 seconds" in errors.partition("Root Cause")[2]


def test_a_wrong_address_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    port = train_support.free_port()
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (values | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(process_group, "_RENDEZVOUS_TIMEOUT", datetime.timedelta(seconds=2))
    with pytest.raises(RunError, match=f"127.0.0.1:{port} within 2 seconds.*MASTER_ADDR"):
        TorchEngine(torch.device("cpu"), torch.float32)
