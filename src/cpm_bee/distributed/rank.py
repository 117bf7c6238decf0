"""This process's place among those that torchrun started, and how a mistake is reported there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Taken at import, before anything slow: a process whose torchrun is gone has another parent by
# the time it reports an error, usually process 1, whose children are none of our business.
_PARENT = os.getppid()
# How long the other workers of a machine leave the reporting to one, in seconds.
_PATIENCE = 30.0


class RankInfo(NamedTuple):
    """Rank among all processes, rank on this machine, and the number of processes."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def of_this_process(cls) -> RankInfo:
        """Read what torchrun set; a process of its own is rank 0 of 1."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        rank, local_rank, world_size = (os.environ.get(n, "") for n in names)
        if not (rank and local_rank and world_size):
            return cls(0, 0, 1)
        return cls(int(rank), int(local_rank), int(world_size))


# Ranks of this run that are known to have ended.
lost: set[int] = set()


def reports() -> bool:
    """Whether this process reports for all of this machine: the first of those that are left."""
    place = RankInfo.of_this_process()
    return lost.issuperset(range(place.rank - place.local_rank, place.rank))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_torchrun_quietly(exit_status: int) -> None:
    """After an error was reported by message: end the torchrun above us without its traceback.

    torchrun answers every failing worker with a traceback of its own, which would bury the line
    that says what to mend. All workers of a machine come to the same error, so one (`reports`) ends
    the others and torchrun, by a signal that it does not handle; the others wait for that. A shell
    sees status 128 + SIGUSR1 for exit status 2 and 128 + SIGUSR2 for 1.

    Does not return under torchrun, and does nothing elsewhere.
    """
    if not under_torchrun():
        return
    if os.getppid() != _PARENT or _PARENT == 1:
        sys.stdout.flush()
        os._exit(exit_status)
    if reports():
        siblings = _children(_PARENT) - {os.getpid()}
        remove_empty_log_folders()
        os.kill(_PARENT, signal.SIGUSR1 if exit_status == 2 else signal.SIGUSR2)
        for sibling in siblings:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sibling, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while os.getppid() == _PARENT and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.stdout.flush()
    os._exit(exit_status)  # at once: the shell has its prompt back already


def _children(parent: int) -> set[int]:
    """The processes that a process has started; empty where the kernel does not tell."""
    try:
        return set(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
    except OSError:
        return set()


def remove_empty_log_folders() -> None:
    """Remove the folder that torchrun makes for its workers' error files and leaves behind."""
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    top = next((p for p in error_file.parents if p.name.startswith("torchelastic_")), None)
    if top is not None:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)
