"""Memory that is mapped from files, by what the kernel says of it; Linux only, else nothing is.

Also the kernel's large pages, for memory that is about to be filled.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import NamedTuple

import torch

_DROP = getattr(mmap, "MADV_DONTNEED", None)
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")


class MappedFile(NamedTuple):
    """Addresses [begin, end) of this process that show a file from an offset on."""

    begin: int
    end: int
    offset: int
    inode: int
    path: str


def mapped_files() -> list[MappedFile]:
    """All files mapped into this process, by address."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        # begin-end permissions offset device inode path; inode 0 is memory without a file.
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path:
            begin, end = (int(part, 16) for part in addresses.split("-"))
            found.append(MappedFile(begin, end, int(offset, 16), int(inode), path[0]))
    return found


def find(begin: int, end: int, files: list[MappedFile]) -> MappedFile | None:
    """The one mapping that holds addresses [begin, end), if there is one."""
    return next((file for file in files if file.begin <= begin and end <= file.end), None)


def drop_pages(tensor: torch.Tensor) -> None:
    """Let the kernel take back the whole pages of a tensor that is mapped from a file.

    They are read again where the tensor is looked at again. Does nothing for any other tensor,
    and outside of Linux. Not for tensors that were written to: the change would be lost.
    """
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
    # Other memory than a file's would come back as zeros.
    if _DROP is not None and first < last and find(first, last, mapped_files()) is not None:
        _advise(first, last, _DROP)


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Back a new tensor on the CPU by pages of 2 MiB, which are made faster than those of 4 KiB."""
    begin = tensor.data_ptr() // _PAGE * _PAGE
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if _HUGE is not None and end - begin >= _HUGE_PAGE:
        _advise(begin, -(-end // _PAGE) * _PAGE, _HUGE)


def _advise(begin: int, end: int, advice: int) -> None:
    # A refusal costs memory or time, nothing else: the result is of no interest.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice)
    )
