"""A pool of CPU memory for the large tensors of a training step.

Each step makes the same dozen large tensors, with slightly different sizes because batches differ
by a few tokens. malloc splits and merges freed blocks for these sizes until a fifth of the peak is
fragments; returning each freed block to the system costs a fifth of the time instead, because its
pages must be mapped and zeroed again. `BufferPool` therefore keeps the storages that it allocates.
A request gets the smallest unused storage that is large enough and at most a third larger;
otherwise a new one is allocated with 3 % headroom, replacing an unused one that is slightly too
small.

Whether a storage is in use is read from its reference count (`torch._C._storage_Use_Count`): 1
means that only the pool references it, because each tensor, view or saved tensor of autograd has a
reference. So callers never return memory, and it cannot be reused too early. Hazards: if another
version of PyTorch lacks that private function, the pool falls back to ordinary allocation; a raw
data pointer does not count as a reference; the pool is not thread-safe; its memory is never freed.
GPUs have a caching allocator, so their tensors, like tensor subclasses (fake, sharded), are
allocated in the ordinary way.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator

import torch

# Returns the number of references to a storage; None if this version of PyTorch lacks it.
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# A storage is reused for a tensor that fills at least this share of it.
_MIN_FILL = 0.75
# Storages are allocated a little larger than requested: the next step's tensors may be larger.
_HEADROOM = 1.03


class BufferPool:
    """Allocates tensors in the storages of tensors that no longer exist; see the module."""

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []
        self._make: Callable[[int], torch.UntypedStorage] = torch.UntypedStorage
        self._forget: Callable[[], None] = lambda: None
        self._is_simulated = False

    @contextlib.contextmanager
    def simulated(
        self,
        make: Callable[[int], torch.UntypedStorage],
        forget: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Serve tensors without values, to predict memory; begins with no storages.

        Args:
            make: returns a storage without memory of a number of bytes.
            forget: drops what else refers to a storage that is replaced.
        """
        before = self._storages, self._make, self._forget, self._is_simulated
        self._storages, self._make, self._forget, self._is_simulated = [], make, forget, True
        try:
            yield
        finally:
            self._storages, self._make, self._forget, self._is_simulated = before

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Returns an uninitialised tensor with a shape, and the dtype and device of `like`."""
        plain = self._is_simulated or type(like) in (torch.Tensor, torch.nn.Parameter)
        if not plain or like.device.type != "cpu" or _use_count is None:
            return like.new_empty(shape)
        nbytes = math.prod(shape) * like.element_size()
        storage = self._find_unused(nbytes) or self._allocate(nbytes)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)  # type: ignore[call-overload]

    def _find_unused(self, nbytes: int) -> torch.UntypedStorage | None:
        """The smallest unused storage that is large enough and not much larger."""
        fitting = (s for s in self._storages if _MIN_FILL * s.nbytes() <= nbytes <= s.nbytes())
        return min(filter(_is_unused, fitting), key=lambda s: s.nbytes(), default=None)

    def _allocate(self, nbytes: int) -> torch.UntypedStorage:
        size = int(nbytes * _HEADROOM)
        near = (s for s in self._storages if _MIN_FILL * size <= s.nbytes() < nbytes)
        too_small = max(filter(_is_unused, near), key=lambda s: s.nbytes(), default=None)
        if too_small is not None:  # replaced, to bound the number of storages
            self._storages.remove(too_small)
            del too_small
            self._forget()
        self._storages.append(self._make(size))
        return self._storages[-1]


def _is_unused(storage: torch.UntypedStorage) -> bool:
    assert _use_count is not None
    return _use_count(storage._cdata) == 1


buffer_pool = BufferPool()


def return_freed_memory() -> None:
    """Make glibc's malloc return freed blocks larger than 1 MiB to the system.

    By default, malloc raises this threshold to up to 32 MiB as a program runs. Use this in programs
    whose large tensors come from `buffer_pool`; in others it costs time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
