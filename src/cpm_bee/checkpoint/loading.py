"""Loads values into the parameters of a model; no other module does.

The tensors of a checkpoint are memory-mapped: reading a value reads its page of the file. They are
converted a piece at a time into new memory of the model's own device and type, and the pages of
each piece are given back to the kernel, so that loading takes little more memory than the model.
Where a tensor has the wanted device and type already, nothing is copied: the parameter is the
mapped tensor, and a page becomes memory of this process only when it is written to.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from cpm_bee.checkpoint.reader import LazyTensor
from cpm_bee.progress import progress_bar

_PIECE = 32 << 20  # bytes of a file that are mapped into memory at a time
_HUGE_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")


def load_into(
    model: nn.Module, tensors: Iterable[tuple[str, LazyTensor]], device: torch.device
) -> None:
    """Give parameters their values on a device, each in the type that the parameter has.

    Shows a progress bar from the third second on.

    Args:
        model: its parameters named in `tensors` are replaced; most often they are on the meta
            device.
        tensors: by name, best in the order of their file.
    """
    parameters = dict(model.named_parameters())
    total = sum(p.nbytes for p in parameters.values())
    with progress_bar(total=total, description="loading", unit="B", delay=2) as bar:
        for name, entry in tensors:
            value = on_device(entry.read(), device, parameters[name].dtype)
            set_parameter(model, name, value)
            bar.update(value.nbytes)


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter, named as in `named_parameters`; it stays trainable or frozen."""
    owner, _, leaf = name.rpartition(".")
    old = module.get_parameter(name)
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, old.requires_grad))


def on_device(source: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a device in a type: itself where it is so already, else a copy.

    The pages of a mapped `source` are dropped, so it must not have been written to.
    """
    if source.device == device and source.dtype == dtype:
        return source.detach()
    target = torch.empty(source.shape, dtype=dtype, device=device)
    use_huge_pages(target)
    copy_values(target, source)
    return target


@torch.no_grad()
def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy into a tensor of any device and type; the pages of a mapped `source` are dropped."""
    pairs = [(target, source)]
    if target.is_contiguous() and source.is_contiguous():
        size = _PIECE // source.element_size()
        pairs = list(zip(target.view(-1).split(size), source.view(-1).split(size), strict=True))
    _read_ahead(source)
    for part, values in pairs:
        # Onto a GPU in the file's type, which has fewer bytes; the conversion is done there.
        part.copy_(values.to(part.device))
        drop_pages(values)


def drop_pages(tensor: torch.Tensor) -> None:
    """Let the kernel take back the memory of a tensor that is mapped from a file.

    The tensor keeps its values: they are read again where it is used again. Does nothing for any
    other tensor, and outside of Linux. Not for tensors that were written to: the change is lost.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    # Other memory than a file's would come back as zeros.
    if tensor.device.type == "cpu" and first < last and _is_of_a_file(first, last):
        _advise(first, last, mmap.MADV_DONTNEED)


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Back new memory of the CPU by pages of 2 MiB, which the kernel makes twice as fast."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _HUGE_PAGE:
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(first, tensor.data_ptr() + tensor.nbytes, getattr(mmap, "MADV_HUGEPAGE", None))


def _read_ahead(tensor: torch.Tensor) -> None:
    """Have the kernel read a mapped tensor in large pieces; faults ask for 128 KiB at a time."""
    if tensor.device.type == "cpu":
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(first, tensor.data_ptr() + tensor.nbytes, mmap.MADV_WILLNEED)


def _is_of_a_file(first: int, last: int) -> bool:
    """Whether the addresses are those of one mapped file; false where the system does not say."""
    if not _MAPS.exists():
        return False
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        # begin-end permissions offset device inode path; inode 0 is memory without a file.
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in addresses.split("-"))
        if begin <= first and last <= end:
            return inode != "0"
    return False


def _advise(first: int, last: int, advice: int | None) -> None:
    # A refusal costs memory or time, nothing else: the result is of no interest.
    if advice is not None:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice)
        )
