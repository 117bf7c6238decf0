"""The peak memory of this process, from the kernel."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> float:
    """The largest resident size so far in MiB; of this program alone.

    Not getrusage: its figure outlives exec, so that a child begins with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
