"""The peak memory of this process, from the kernel."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> float:
    """The largest resident size of this program so far, in MiB.

    Does not use getrusage, whose value survives exec: a child begins with that of its parent.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
