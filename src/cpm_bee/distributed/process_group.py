"""Join and leave the process group of a run; report ranks that end early.

After an error, a process must end without NCCL's help: aborting or destroying a communicator can
wait for ranks that are gone or stuck, and then torchrun, which waits for this process, does not
stop them. PyTorch does the former also when the interpreter releases the process group. So `leave`
keeps the group, and an exit handler ends the process before the interpreter releases anything.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cpm_bee.distributed.heartbeat import Heartbeat
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import RunError, exit_status_of

_TIMEOUT = datetime.timedelta(minutes=30)  # rank 0 may be making a token index
_GLOO_RELEASE_TIME = 0.1  # seconds
_POLL_TIME = 0.1  # seconds
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=2)  # for the first machine to answer

_NCCL = "nccl"
_heartbeat: Heartbeat | None = None
_store: dist.Store | None = None  # a connection of its own
_abandoned: int | None = None  # the exit status, once an error has ended a run with NCCL


def join(device: torch.device) -> None:
    """Join the other ranks that torchrun started. Raises `RunError` if they do not connect.

    Args:
        device: a GPU with its index, for NCCL; or the CPU, for gloo.
    """
    global _heartbeat, _store
    try:
        # `init_process_group` itself would also wait `_TIMEOUT` for the first machine.
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
        store.set_timeout(_TIMEOUT)  # some ranks may take long to start
        _store = dist.PrefixStore("wait", store.clone())
        nccl = device.type == "cuda"
        if nccl:
            atexit.register(_end_if_abandoned)  # before others, so that it runs after them
        # The ranks connect below, and one may be lost there already.
        _heartbeat = Heartbeat(store, rank, world_size, nccl=nccl)
        dist.init_process_group(
            _NCCL if nccl else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
            # NCCL connects now, and `barrier` knows the GPU; gloo takes none.
            device_id=device if nccl else None,
        )
    except (RuntimeError, ValueError) as error:
        leave()
        address = ":".join(os.environ.get(n, "?") for n in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunError(
            f"the processes could not connect to each other at {address} within "
            f"{_RENDEZVOUS_TIMEOUT.total_seconds():.0f} seconds ({_reason(error)}); MASTER_ADDR "
            "must be the first machine's address, and no firewall may block it"
        ) from None


def wait_for_all(place: str) -> None:
    """Wait until all ranks have come to a place, which each passes once, however long it takes.

    A collective would give up after half an hour, and would let no signal through. The heartbeat
    ends this process if a rank is lost.
    """
    assert _store is not None, "call join first"
    world_size = RankInfo.of_this_process().world_size
    with exchange():
        arrived = _store.add(place, 1)
        while arrived < world_size:
            time.sleep(_POLL_TIME)
            arrived = _store.add(place, 0)


def leave() -> None:
    """Leave the process group, if any, and tell the other ranks of an error being handled."""
    global _heartbeat, _store, _abandoned
    _store = None
    error = sys.exc_info()[1]
    if _heartbeat is not None:
        _heartbeat.close(None if error is None else _reason(error))
        _heartbeat = None
    if not dist.is_initialized():
        return
    if error is not None and dist.get_backend() == _NCCL:
        _abandoned = exit_status_of(error)
    else:
        dist.destroy_process_group()
        # A thread of gloo may still have to release the last tensor, which needs the interpreter.
        # If the interpreter is shutting down by then, the process aborts.
        if error is None:
            time.sleep(_GLOO_RELEASE_TIME)
        else:  # report it first: torchrun may end this process
            atexit.register(time.sleep, _GLOO_RELEASE_TIME)


def _end_if_abandoned() -> None:
    if _abandoned is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_abandoned)


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """A context for collectives. Raises `RunError` if one fails because a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or isinstance(error, torch.OutOfMemoryError):
            raise
        cause = None if _heartbeat is None else _heartbeat.explain_failure()
        unknown = f"another process of this run has ended ({_reason(error)})"
        raise RunError(cause or unknown) from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
