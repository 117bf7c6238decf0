"""Counts the bytes of the tensors that code keeps, with or without values."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Sums the live storages that operations inside this mode have made.

    Args:
        fake: the FakeTensorMode in which `torch.empty` makes tensors; None for real tensors.

    Attributes:
        live, peak: the number of bytes now, and the largest number so far.
    """

    def __init__(self, fake: Any = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._fake = fake
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1.0  # a norm or a loss: no size depends on it
        if self._fake is not None and func is torch.ops.aten.empty.memory_format:
            # A large buffer, which fake tensors will fill.
            with self._fake:
                found = func(*args, **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        self._see(found)
        return found

    def _see(self, found: Any) -> None:
        if isinstance(found, (list, tuple)):
            for item in found:
                self._see(item)
        if not isinstance(found, torch.Tensor):
            return
        storage = found.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
