"""Loads values into the parameters of a model; no other module does.

The tensors of a checkpoint are memory-mapped: reading a value reads its page of the file. They are
copied piece by piece to the model's device and dtype, and the pages of each piece are released, so
that loading takes little more memory than the model. A tensor that already has the right device and
dtype is not copied: the parameter is the mapped tensor, and a page becomes memory of this process
only when it is written to.
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

_PIECE = 32 << 20  # bytes that are copied before their pages are released
_HUGE_PAGE = 2 << 20
_MAPS = Path("/proc/self/maps")


def load_into(
    model: nn.Module, tensors: Iterable[tuple[str, LazyTensor]], device: torch.device
) -> None:
    """Replace parameters by values on a device; each parameter keeps its dtype.

    Shows a progress bar after two seconds.

    Args:
        model: the model; its parameters are usually on the meta device.
        tensors: (name, value) pairs, preferably in the order of their file.
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
    """Returns a tensor on a device in a dtype; a copy unless it already matches.

    Copying drops the pages of a mapped `source`, so it must not have been written to.
    """
    if source.device == device and source.dtype == dtype:
        return source.detach()
    target = torch.empty(source.shape, dtype=dtype, device=device)
    use_huge_pages(target)
    copy_values(target, source)
    return target


@torch.no_grad()
def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy to a tensor of any device and dtype; drops the pages of a mapped `source`."""
    pairs = [(target, source)]
    if target.is_contiguous() and source.is_contiguous():
        size = _PIECE // source.element_size()
        pairs = list(zip(target.view(-1).split(size), source.view(-1).split(size), strict=True))
    read_ahead(source)
    for part, values in pairs:
        # Copied to a GPU in the file's dtype, which has fewer bytes, and converted there.
        part.copy_(values.to(part.device))
        drop_pages(values)


def drop_pages(tensor: torch.Tensor) -> None:
    """Release the memory of a tensor that is mapped from a file.

    The tensor keeps its values, which are read again when used. Does nothing for other tensors, or
    on systems other than Linux. Hazard: changes to a tensor that was written to are lost.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    # Memory that is not mapped from a file would become zeros.
    if tensor.device.type == "cpu" and first < last and _is_of_a_file(first, last):
        _advise(first, last, mmap.MADV_DONTNEED)


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Use pages of 2 MiB for new CPU memory, which the kernel allocates twice as fast."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _HUGE_PAGE:
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(first, tensor.data_ptr() + tensor.nbytes, getattr(mmap, "MADV_HUGEPAGE", None))


def read_ahead(tensor: torch.Tensor) -> None:
    """Prefetch a mapped tensor in large reads; page faults read only 128 KiB at a time."""
    if tensor.device.type == "cpu":
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(first, tensor.data_ptr() + tensor.nbytes, mmap.MADV_WILLNEED)


def _is_of_a_file(first: int, last: int) -> bool:
    """Whether the addresses belong to one mapped file; false on systems without /proc."""
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
    # The result is ignored: a refusal only costs memory or time.
    if advice is not None:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice)
        )
