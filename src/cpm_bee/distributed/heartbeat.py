"""Detects a rank that has ended or hangs, so that the others do not wait for it.

When a peer's connection breaks, a collective operation fails with an error that does not name the
peer; when a peer hangs, it waits for half an hour. So every rank runs a thread that

- registers its process (machine and process id) in the store of the process group,
- increments a counter there every two seconds: its heartbeat,
- looks in the store for a note about lost ranks, in /proc for the processes of its own machine, and
  at the counters for those of others. The first rank to notice a loss writes the note for all.

A rank that fails with an error of its own writes the note itself (`close`). After a failed
collective the main thread asks for the cause (`explain_failure`). A main thread that is still stuck
in a collective ten seconds after a rank was lost cannot raise an error: the heartbeat thread then
prints the cause and ends the process. It signals no other process: torchrun stops the rest.

With NCCL the main thread waits for the GPU, and no error reaches it there. Where NCCL itself sees
a broken connection (between machines), PyTorch's watchdog thread, which looks ten times a second,
aborts the process with a C++ error that does not name the lost rank. Where it does not see one
(on one machine), nothing ends the collective before its timeout of half an hour. So with NCCL the
heartbeat thread looks five times a second for the note and for the processes of its own machine,
and ends the process as soon as a rank is lost without a word. The watchdog may still be faster.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from cpm_bee.distributed.rank import is_reporting_rank, lost_ranks, report_error
from cpm_bee.files import remove_lock_files

_INTERVAL = 2.0  # seconds between two heartbeats, and between two checks of the other ranks
# Seconds without a heartbeat after which a rank counts as lost: after a failed collective, and
# otherwise, when its machine may just be busy.
_SILENCE, _LONG_SILENCE = 10.0, 40.0
# Seconds for the main thread to leave a collective by itself once a rank is lost.
_GRACE = 10.0
_NCCL_PAUSE = 0.2  # seconds between two checks for the note and in /proc, with NCCL
_LOST, _DONE = "lost", "done"  # keys in the store


class _Process(NamedTuple):
    machine: str
    host: str
    pid: int

    @classmethod
    def of_this_process(cls) -> _Process:
        """`machine` is the same for processes that see each other in /proc (one PID namespace)."""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(
                f"{boot}/{os.readlink('/proc/self/ns/pid')}", socket.gethostname(), os.getpid()
            )
        return cls(f"{socket.gethostname()}/{os.getpid()}", socket.gethostname(), os.getpid())

    def has_ended(self) -> bool:
        """Whether this process, on this machine, has ended; a zombie counts as ended."""
        try:
            # pid (name) state ...
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"


class Heartbeat:
    """This rank's heartbeat in a store, and its check of the other ranks.

    Args:
        nccl: whether collectives run on NCCL, which raises no error for a lost rank.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, nccl: bool) -> None:
        # A separate connection: another user may block on the given one for a long time.
        self._store = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        self._rank, self._ranks = rank, range(world_size)
        self._own = _Process.of_this_process()
        self._store.set(f"process/{rank}", "\n".join(map(str, self._own)))
        self._store.add(f"beat/{rank}", 1)
        self._processes: list[_Process] = []  # by rank, once all have registered
        self._last_beats: dict[int, tuple[bytes, float]] = {}  # counter, and when it last changed
        self._nccl = nccl
        self._closed = threading.Event()
        self._claims = threading.Lock()
        self._reporter = ""  # the thread that reports a loss: the other one must not do so too
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, failure: str | None) -> None:
        """Stop, and tell the other ranks that this one ends, and of the error if there is one."""
        self._closed.set()
        self._thread.join(_INTERVAL)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{_DONE}/{self._rank}", "")
            if failure is not None and not lost_ranks:
                self._publish(f"rank {self._rank} has ended: {failure}", [self._rank])

    def explain_failure(self) -> str | None:
        """Returns a sentence that names the ranks lost in a failed collective, or None."""
        if not self._claims_report("main"):
            time.sleep(2 * _GRACE)  # the heartbeat thread ends this process
        deadline = time.monotonic() + _SILENCE + 3 * _INTERVAL
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if cause := self._check(_SILENCE):
                    if len({p.machine for p in self._processes}) > 1:
                        # The store may end with this machine's torchrun: let the others read it.
                        time.sleep(2 * _INTERVAL)
                    return cause
                time.sleep(0.2)
        return None

    def _run(self) -> None:
        next_beat = 0.0
        with contextlib.suppress(RuntimeError):  # the store is gone, and rank 0 with it
            while not self._closed.wait(_NCCL_PAUSE if self._nccl else _INTERVAL):
                silence = None
                if time.monotonic() >= next_beat:
                    self._store.add(f"beat/{self._rank}", 1)
                    next_beat = time.monotonic() + (_INTERVAL if self._nccl else 0)
                    silence = _LONG_SILENCE
                if (cause := self._check(silence)) and self._must_end():
                    self._end_process(cause)

    def _must_end(self) -> bool:
        """Whether this thread has to end the process; waits for the main thread to do so.

        With NCCL it waits only if the ranks have reported errors of their own: the main thread may
        have the same error, and an exit status for it, or still be saving what they all saved.
        """
        reported = all(self._store.check([f"{_DONE}/{rank}"]) for rank in tuple(lost_ranks))
        if self._nccl and not reported and self._claims_report("heartbeat"):
            return True
        return not self._closed.wait(_GRACE)

    def _claims_report(self, thread: str) -> bool:
        with self._claims:
            self._reporter = self._reporter or thread
            return self._reporter == thread

    def _end_process(self, cause: str) -> None:
        if is_reporting_rank():
            report_error(cause)
        elif self._closed.wait(_GRACE):  # torchrun stops this rank when the reporting one exits
            return
        remove_lock_files()
        os._exit(1)

    def _check(self, silence: float | None) -> str | None:
        """Returns a sentence that names the lost ranks, or None.

        Args:
            silence: the seconds without a heartbeat after which a rank is lost; None: do not look.
        """
        if self._store.check([_LOST]):
            ranks, _, text = self._store.get(_LOST).decode().partition("\n")
            lost_ranks.update(map(int, ranks.split()))
            return text
        if not self._all_registered():
            return None
        lost = [rank for rank in self._ranks if self._is_gone(rank)]
        reason = "is gone"
        if not lost and silence is not None:
            lost = list(self._silent_ranks(silence))
            reason = f"has sent no heartbeat for {silence:.0f} seconds"
        # A rank that ended normally has said so first.
        lost = [rank for rank in lost if not self._store.check([f"{_DONE}/{rank}"])]
        if not lost:
            return None
        names = [f"{self._processes[r].pid} on {self._processes[r].host}" for r in lost]
        ranks = ", ".join(map(str, lost))
        text = f"rank {ranks} of this run has ended (process {', '.join(names)} {reason})"
        self._publish(text, lost)
        return text

    def _publish(self, text: str, ranks: list[int]) -> None:
        lost_ranks.update(ranks)
        self._store.set(_LOST, f"{' '.join(map(str, ranks))}\n{text}")

    def _all_registered(self) -> bool:
        if not self._processes:
            keys = [f"process/{rank}" for rank in self._ranks]
            if self._store.check(keys):
                values = [value.decode().split("\n") for value in self._store.multi_get(keys)]
                self._processes = [_Process(m, host, int(pid)) for m, host, pid in values]
        return bool(self._processes)

    def _is_gone(self, rank: int) -> bool:
        process = self._processes[rank]
        return process.machine == self._own.machine and process.has_ended()

    def _silent_ranks(self, seconds: float) -> Iterator[int]:
        now = time.monotonic()
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._ranks])
        for rank, beat in zip(self._ranks, beats, strict=True):
            last, since = self._last_beats.get(rank, (b"", now))
            if beat != last:
                self._last_beats[rank] = (beat, now)
            elif now - since > seconds and rank != self._rank:
                yield rank
