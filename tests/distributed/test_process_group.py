"""Joining and leaving a process group: what PyTorch is asked for, without a GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
import train_support

from cpm_bee.distributed import process_group

Calls = list[Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The calls of `torch.distributed`, which are recorded and do nothing."""
    made: Calls = []
    store = dist.TCPStore(
        "127.0.0.1", train_support.free_port(), is_master=True, wait_for_workers=False
    )
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: made.append((a, k)))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(made))
    monkeypatch.setattr(dist, "get_backend", lambda: made[0][0][0])
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("destroyed"))
    monkeypatch.setattr(process_group.atexit, "register", lambda *call: None)
    monkeypatch.setattr(process_group, "_abandoned", None)
    yield made
    process_group.leave()  # ends the heartbeat of a failed test


@pytest.mark.parametrize(
    ("device", "backend", "bound"),
    [
        (torch.device("cuda", 1), "nccl", torch.device("cuda", 1)),
        (torch.device("cpu"), "gloo", None),
    ],
    ids=str,
)
def test_nccl_is_told_its_gpu(
    calls: Calls, device: torch.device, backend: str, bound: torch.device | None
) -> None:
    process_group.join(device)
    (name,), values = calls[0]
    assert (name, values["device_id"]) == (backend, bound)
    process_group.leave()
    assert calls[1:] == ["destroyed"]
    assert process_group._abandoned is None


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_an_error_leaves_nccl_alone(calls: Calls, device: str) -> None:
    try:
        process_group.join(torch.device(device))
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        process_group.leave()
    left = device == "cuda:0"
    assert calls[1:] == ([] if left else ["destroyed"])
    assert process_group._abandoned == (130 if left else None)


def test_a_rank_that_cannot_connect_tells_the_others(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(
        process_group.Heartbeat, "close", lambda self, failure: told.append(failure)
    )

    def fail(*args: object, **kwargs: object) -> None:
        raise dist.DistBackendError("no route\nin 3 lines")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(process_group.RunError, match=r"could not connect .*\(no route\)"):
        process_group.join(torch.device("cuda", 0))
    assert told == ["no route"]


ENDING = """
import time
import torch.distributed as dist
from cpm_bee.cli import run_command
from cpm_bee.distributed import process_group
from cpm_bee.errors import InputError

class Communicator:
    def close(self):
        print("closing", flush=True)
        time.sleep(1000)
    __del__ = close

held = Communicator()
dist.is_initialized, dist.get_backend = lambda: True, lambda: "nccl"
dist.destroy_process_group = held.close
process_group.atexit.register(process_group._end_if_abandoned)

def main():
    try:
        raise InputError("no such file")
    finally:
        process_group.leave()

run_command(main)
"""


def test_a_process_ends_with_its_status_while_nccl_hangs() -> None:
    begin = time.monotonic()
    done = forked.run(
        [sys.executable, "-c", ENDING],
        env=train_support.environment(PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    message = "error: no such file (explain: E201)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert time.monotonic() - begin < 60
