"""The memory that this process uses."""

from __future__ import annotations

import resource
import sys

import torch


def memory_use() -> dict[str, int | None]:
    """Returns the largest memory so far in bytes: of the host, and of the GPU if one is used."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "host_memory": largest * (1 if sys.platform == "darwin" else 1024),
        "gpu_memory": torch.cuda.max_memory_allocated() if in_use else None,
    }
