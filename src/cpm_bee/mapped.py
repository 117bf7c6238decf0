"""Giving back the memory of a mapped file's pages once they have been copied."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch

_ADVICE = getattr(mmap, "MADV_DONTNEED", None)
_PAGE = mmap.PAGESIZE
_MAPS = Path("/proc/self/maps")


def drop_pages(tensor: torch.Tensor) -> None:
    """Let the kernel take back the whole pages of a tensor that is mapped from a file.

    They are read again where the tensor is looked at again. Does nothing for any other tensor,
    and outside of Linux. Not for tensors that were written to: the change would be lost.
    """
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    first = -(-begin // _PAGE) * _PAGE
    length = end // _PAGE * _PAGE - first
    # Other memory than a file's would come back as zeros.
    if _ADVICE is not None and length > 0 and _is_mapped_file(first, first + length):
        # A refusal costs memory, nothing else: the result is of no interest.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(_ADVICE)
        )


def _is_mapped_file(begin: int, end: int) -> bool:
    """Whether addresses lie within one mapping of a file, by what the kernel says."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        # begin-end permissions offset device inode path; inode 0 is memory without a file.
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in addresses.split("-"))
        if low <= begin and end <= high:
            return inode != "0"
    return False
