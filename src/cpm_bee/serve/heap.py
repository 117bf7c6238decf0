"""Free memory goes back to the system, so that a server does not grow with the time that it runs.

Batches have any number of tokens, so their tensors have any size. glibc's malloc keeps what is
freed for later, but blocks of other sizes seldom fit: they are cut from its end, and the heap grows
though the memory in use does not. It also learns from large blocks that are freed to take such
blocks from the heap too (up to 32 MiB) instead of asking the system for each of them.
`malloc_trim` gives back all whole pages that are free, also between blocks in use. It takes some
hundredths of a second, and the pages that are needed again some more: too much for each step.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

SECONDS = 10.0  # between two trims of a server that is busy
IDLE_SECONDS = 1.0  # without work, after which a server trims once


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
