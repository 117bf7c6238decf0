"""Memory that serves step after step."""

from __future__ import annotations

import contextlib
import ctypes
import math

import torch

# Whether a storage is looked at by others than its Buffers: without this, nothing is used again.
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# A storage is taken for a tensor that fills at least this share of it.
_LEAST_SHARE = 0.75
# Storages are made a little larger than asked for: the next step's tensors may be.
_ROOM = 1.03


class Buffers:
    """Makes large tensors out of the memory of earlier ones that are gone, for the CPU.

    The steps of a run differ a little in size, and malloc, asked for megabytes of ever other
    sizes, breaks up what was given back: a quarter more memory. Giving it back to the system
    instead costs a fifth of the time. GPUs have an allocator that does this job already.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """A tensor of a shape with the type of another, on its device; any values."""
        plain = type(like) in (torch.Tensor, torch.nn.Parameter)  # not e.g. a fake tensor
        if not plain or like.device.type != "cpu" or _use_count is None:
            return like.new_empty(shape)
        nbytes = math.prod(shape) * like.element_size()
        storage = self._unused(nbytes) or self._new(nbytes)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)  # type: ignore[call-overload]

    def _unused(self, nbytes: int) -> torch.UntypedStorage | None:
        """The smallest that holds so much, of those that are not much larger."""
        fitting = (s for s in self._storages if _LEAST_SHARE * s.nbytes() <= nbytes <= s.nbytes())
        return min(filter(_is_unused, fitting), key=lambda s: s.nbytes(), default=None)

    def _new(self, nbytes: int) -> torch.UntypedStorage:
        size = int(nbytes * _ROOM)
        near = (s for s in self._storages if _LEAST_SHARE * size <= s.nbytes() < nbytes)
        outgrown = max(filter(_is_unused, near), key=lambda s: s.nbytes(), default=None)
        if outgrown is not None:  # a larger one takes its place, so that their number is bounded
            self._storages.remove(outgrown)
            del outgrown
        self._storages.append(torch.UntypedStorage(size))
        return self._storages[-1]


def _is_unused(storage: torch.UntypedStorage) -> bool:
    assert _use_count is not None
    return _use_count(storage._cdata) == 1


buffers = Buffers()


def return_freed_memory() -> None:
    """Let malloc (glibc's) return what is larger than a mebibyte to the system once it is free.

    Of its own accord it comes to keep up to 32 MiB. For programs whose large tensors are `buffers`.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
