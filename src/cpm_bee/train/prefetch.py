"""Makes batches and copies them to the device while the previous step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from cpm_bee.data.batch import Batch

StepT = TypeVar("StepT")
Batches = list[Batch | None]  # None where this rank has nothing to compute but others have


def prefetch(
    steps: Iterator[StepT],
    make: Callable[[StepT], Sequence[Batch | None]],
    device: torch.device,
    *,
    background: bool | None = None,
) -> Generator[tuple[StepT, Batches], None, None]:
    """Yields steps, each with its batches on the device.

    A background thread makes and copies the batches of the next step. `steps` may communicate with
    other ranks, so only the caller's thread advances it, one step ahead.

    Args:
        make: makes the batches of a step, on the CPU and without communication.
        background: use the thread. None: only for a GPU, as a CPU is busy with the step itself.
    """
    if background is None:
        background = device.type == "cuda"
    if not background:
        for step in steps:
            yield step, [None if b is None else b.to(device) for b in make(step)]
        return
    copier = _Copier(device)
    waiting: deque[tuple[StepT, Future[_Copy]]] = deque()
    # On an early exit, by an error or by the caller, the pool waits for the step being made.
    with ThreadPoolExecutor(1, "prefetch") as pool:
        for step in steps:
            waiting.append((step, pool.submit(lambda s: copier.send(make(s)), step)))
            if len(waiting) > 1:
                earlier, copy = waiting.popleft()
                yield earlier, copier.receive(copy.result())
        for step, copy in waiting:
            yield step, copier.receive(copy.result())


_Copy = tuple[Batches, torch.cuda.Event | None]


class _Copier:
    """Copies batches to a device; for a GPU, from page-locked memory and on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batches: Sequence[Batch | None]) -> _Copy:
        """Start copying. Setting the stream also sets the thread's current device."""
        if self._stream is None:
            return [None if b is None else b.to(self._device) for b in batches], None
        with torch.cuda.stream(self._stream):
            moved = [None if b is None else b.pin_memory().to(self._device) for b in batches]
            return moved, self._stream.record_event()

    def receive(self, copy: _Copy) -> Batches:
        """Returns the batches for use on the current stream, which waits for the copy."""
        batches, copied = copy
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for batch in batches:
                for tensor in batch.tensors().values() if batch is not None else ():
                    # Otherwise its memory, which belongs to the other stream, could be reused while
                    # kernels of this one still read it.
                    tensor.record_stream(current)
        return batches
