"""DDP: every process holds the whole model, and sums the gradients of a step over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from cpm_bee.distributed.process_group import exchange
from cpm_bee.engine.parallel_strategy import ParallelStrategy
from cpm_bee.model.network import CPMBee

# Bytes of gradients that are copied to be summed together: large enough for a network, and little
# memory beside the gradients themselves.
BUCKET = 32 << 20


def buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yields the gradients in order: together up to `BUCKET` bytes, larger ones alone."""
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in (*bucket, gradient)) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket


class DDPStrategy(ParallelStrategy):
    """Every process holds the whole model: its part of a tensor is the whole tensor.

    Args:
        world_size: the number of processes.
    """

    lockstep = False

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size

    def distribute(self, model: CPMBee) -> None:
        model.to(self._device)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def whole(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return local.detach().to("cpu", copy=True)

    def part_of(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return whole

    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        if self._world_size == 1:
            return
        for bucket in buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                with exchange():
                    dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([g.reshape(-1) for g in bucket])
            with exchange():
                dist.all_reduce(flat)
            parts = flat.split([g.numel() for g in bucket])
            for gradient, summed in zip(bucket, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        return value
