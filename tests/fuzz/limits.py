"""What an input may cost: time, by a signal; memory, by the kernel's own record of the peak."""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
MEMORY_FACTOR, MEMORY_EXTRA = 4, 200 << 20
# Address space beyond what the process has at its start. It protects the machine; inputs are
# judged by the memory they touch.
_ADDRESS_SPACE = 8 << 30


class HangError(BaseException):
    """An input took too long. No `Exception`: no handler of the product may swallow it."""


class MemoryUseError(BaseException):
    """An input made the process take more memory than it may."""


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}")


def limit_address_space() -> None:
    limit = _status("VmSize") + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def limits(input_bytes: int, seconds: float) -> Iterator[None]:
    """Raise where the block takes longer, or its peak of memory is higher than is allowed.

    A hang outside of Python's own code, where no signal handler runs, ends the process with the
    stack, after three times as long.
    """

    def stop(number: int, frame: object) -> None:
        raise HangError(f"took more than {seconds:g} seconds")

    _CLEAR.write_text("5")  # the peak is now the present
    before = _status("VmRSS")
    old = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, old)
    used = _status("VmHWM") - before
    if used > MEMORY_FACTOR * input_bytes + MEMORY_EXTRA:
        raise MemoryUseError(f"took {used >> 20} MiB for {input_bytes:,} bytes")
