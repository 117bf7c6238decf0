"""The rank of this process, and which rank reports an error.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE for each process that it starts. When one of them
fails, torchrun stops the others on its machine (SIGTERM, after 30 seconds SIGKILL), prints a report
and exits with status 1. A wrong flag or a missing file usually fails on all ranks at about the same
time, and should be printed once:

- Rank 0 prints the error and exits. On a machine that does not have rank 0, or has lost it, the
  lowest remaining rank does so, and names itself.
- The other ranks wait for torchrun to stop them. One that still runs after 20 seconds has an error
  of its own: it prints that error with its rank, and exits.
- The message is also written to the file (TORCHELASTIC_ERROR_FILE) that torchrun's report is made
  from; an unexpected error goes there with its traceback (`record`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cpm_bee.language import said

# Seconds for the reporting rank to reach an error that all ranks have. A longer time delays the
# report of an error that only another rank has.
_PATIENCE = 20.0


class RankInfo(NamedTuple):
    """Rank among all processes, rank on this machine, and the number of processes."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def of_this_process(cls) -> RankInfo:
        """Read what torchrun set; a process without torchrun is rank 0 of 1."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        rank, local_rank, world_size = (os.environ.get(n, "") for n in names)
        if not (rank and local_rank and world_size):
            return cls(0, 0, 1)
        return cls(int(rank), int(local_rank), int(world_size))


# Ranks of this run that are known to have ended.
lost_ranks: set[int] = set()

# Set by the handler of SIGTERM. torchrun is then already stopping this machine's processes, and
# sends no second signal to one that waits.
is_terminating = False


def is_reporting_rank() -> bool:
    """Whether this is the lowest rank left on this machine."""
    info = RankInfo.of_this_process()
    return lost_ranks.issuperset(range(info.rank - info.local_rank, info.rank))


def report_error(message: str) -> None:
    """Report an error that ends this process, unless the machine's reporting rank does so."""
    if not is_reporting_rank():
        if is_terminating:
            return
        time.sleep(_PATIENCE)  # torchrun ends this process when the reporting rank exits
    rank = RankInfo.of_this_process().rank
    where = f"rank {rank} on {socket.gethostname()}: " if rank > 0 else ""
    with contextlib.suppress(OSError):  # a full disk, a closed terminal: the exit status remains
        print(f"{said('error')}: {where}{message}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun prints "py_callstack", and takes the earliest timestamp for the root cause.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": message, "extraInfo": extra}})
        with contextlib.suppress(OSError):
            Path(path).write_text(text, encoding="utf-8")


def record(
    main: Callable[[], int | None], is_reported: Callable[[BaseException], bool]
) -> Callable[[], int | None]:
    """Wrap an entry script's `main` so that torchrun's report has the traceback of an error.

    This is `torch.distributed.elastic.multiprocessing.errors.record`, except for errors that
    `report_error` has already reported. Without torchrun, it returns `main` itself and does not
    import torch.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing import errors

    class UnexpectedErrors(errors.ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            if not is_reported(e):
                super().record_exception(e)

    return errors.record(main, UnexpectedErrors())
