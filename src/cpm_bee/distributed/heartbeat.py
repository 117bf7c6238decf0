"""Which process of a run has ended: told by those beside it, or by its silence."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from cpm_bee.distributed.rank import end_torchrun_quietly, lost, reports

_INTERVAL = 2.0  # seconds between two signs of life, and between two looks at the others
# Seconds without a sign of life that tell of an end, where an exchange has failed; where none
# has, since a machine may be busy.
_SILENCE, _LONG_SILENCE = 10.0, 40.0
# Seconds in which a process that waits for a lost one should see it by itself.
_GRACE = 10.0
_LOST, _DONE = "lost", "done"


class _Process(NamedTuple):
    machine: str
    host: str
    number: int

    @classmethod
    def of_this_process(cls) -> _Process:
        """Processes can be looked up by number within a namespace of a running kernel."""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(
                f"{boot}/{os.readlink('/proc/self/ns/pid')}", socket.gethostname(), os.getpid()
            )
        return cls(f"{socket.gethostname()}/{os.getpid()}", socket.gethostname(), os.getpid())

    def has_ended(self) -> bool:
        """For a process of this machine; one that its parent has not noticed yet has ended, too."""
        try:
            # number (name) state ...
            stat = Path(f"/proc/{self.number}/stat").read_text(errors="replace")
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"


class Heartbeat:
    """Gives signs of life in a store, and looks for the end of the others.

    Ends this process, with a message, where it hangs in an exchange with one that has ended.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        # Of its own: another user of the connection may wait in it for long.
        self._store = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        self._rank, self._ranks = rank, range(world_size)
        self._own = _Process.of_this_process()
        self._store.set(f"process/{rank}", "\n".join(map(str, self._own)))
        self._store.add(f"beat/{rank}", 1)
        self._processes: list[_Process] = []
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, failure: str | None) -> None:
        """Tell the others that this process ends now, and why if it is for a failure."""
        self._ended.set()
        self._thread.join(_INTERVAL)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{_DONE}/{self._rank}", "")
            if failure is not None and not lost:
                self._publish(f"rank {self._rank} has ended: {failure}", [self._rank])

    def find(self) -> str | None:
        """After a failed exchange: a sentence that names who has ended, if it can be found out."""
        deadline = time.monotonic() + _SILENCE + 3 * _INTERVAL
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if found := self._look(_SILENCE):
                    if len({p.machine for p in self._processes}) > 1:
                        time.sleep(2 * _INTERVAL)  # the store may end with this machine's torchrun
                    return found
                time.sleep(0.2)
        return None

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: so is rank 0, or soon
            while not self._ended.wait(_INTERVAL):
                self._store.add(f"beat/{self._rank}", 1)
                if (found := self._look(_LONG_SILENCE)) and not self._ended.wait(_GRACE):
                    if reports():
                        print(f"error: {found}", file=sys.stderr, flush=True)
                    end_torchrun_quietly(1)
                    os._exit(1)

    def _look(self, silence: float) -> str | None:
        if self._store.check([_LOST]):
            ranks, _, text = self._store.get(_LOST).decode().partition("\n")
            lost.update(map(int, ranks.split()))
            return text
        if not self._know_all():
            return None
        gone = [rank for rank in self._ranks if self._is_gone(rank)]
        text = " is gone"
        if not gone:
            gone = list(self._silent(silence))
            text = f" has given no sign of life for {silence:.0f} seconds"
        # One that ended well has said so before.
        gone = [rank for rank in gone if not self._store.check([f"{_DONE}/{rank}"])]
        if not gone:
            return None
        names = [f"{self._processes[r].number} on {self._processes[r].host}" for r in gone]
        who = ", ".join(map(str, gone))
        text = f"rank {who} of this run has ended (process {', '.join(names)}{text})"
        self._publish(text, gone)
        return text

    def _publish(self, text: str, ranks: list[int]) -> None:
        lost.update(ranks)
        self._store.set(_LOST, f"{' '.join(map(str, ranks))}\n{text}")

    def _know_all(self) -> bool:
        if not self._processes:
            keys = [f"process/{rank}" for rank in self._ranks]
            if self._store.check(keys):
                values = [value.decode().split("\n") for value in self._store.multi_get(keys)]
                self._processes = [_Process(m, host, int(n)) for m, host, n in values]
        return bool(self._processes)

    def _is_gone(self, rank: int) -> bool:
        process = self._processes[rank]
        return process.machine == self._own.machine and process.has_ended()

    def _silent(self, seconds: float) -> Iterator[int]:
        now = time.monotonic()
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._ranks])
        for rank, beat in zip(self._ranks, beats, strict=True):
            before, since = self._heard.get(rank, (b"", now))
            if beat != before:
                self._heard[rank] = (beat, now)
            elif now - since > seconds and rank != self._rank:
                yield rank
