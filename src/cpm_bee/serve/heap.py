"""Free memory goes back to the system, so that a server does not grow for as long as it runs.

Batches have any number of tokens, so their tensors have any size. glibc's malloc keeps what is
freed for later, but blocks of other sizes seldom fit: they are cut from its end, and the heap grows
though the memory in use does not. It begins with a system call for each block from 128 KiB on, and
learns from those that are freed to take larger and larger ones, up to 32 MiB, from the heap.

`return_large_blocks` keeps it from learning that. The pages of a large block are then zeroed anew
each time. A small model notices it (a third of its speed), a larger one less: it computes more for
each of them.
`malloc_trim` gives back all whole pages of the heap that are free, also between blocks in use. It
takes some hundredths of a second: too much for each step.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

LARGE = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # of malloc.h
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
SECONDS = 10.0  # between two trims of a server that is busy
IDLE_SECONDS = 1.0  # without work, after which a server trims once


def return_large_blocks() -> bool:
    """Have blocks from `LARGE` on returned to the system when they are freed, in this process.

    Returns whether it is so: not with another C library, nor where the user has set a threshold.
    """
    if _THRESHOLD in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE))


def malloc_trim() -> Callable[[], object] | None:
    """glibc's function that gives free memory back; None where there is another C library."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda: trim(0)


class HeapTrimmer:
    """Decides when to trim; is used by one thread.

    Args:
        trim: gives free memory back; None if nothing can.
        clock: seconds.
    """

    def __init__(
        self,
        trim: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trim, self._clock = trim, clock
        self._last = clock()
        self._has_worked = False

    @property
    def seconds_to_wait(self) -> float | None:
        """How long a thread without work may wait before it calls `is_idle`; None for ever."""
        return IDLE_SECONDS if self._has_worked and self._trim is not None else None

    def has_worked(self) -> None:
        """Note that memory was used; trims if that has gone on for `SECONDS`."""
        self._has_worked = True
        if self._clock() - self._last >= SECONDS:
            self._trim_now()

    def is_idle(self) -> None:
        """Trim what the last work has left."""
        if self._has_worked:
            self._trim_now()
            self._has_worked = False

    def _trim_now(self) -> None:
        if self._trim is not None:
            self._trim()
        self._last = self._clock()
