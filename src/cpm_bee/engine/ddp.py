"""DDP: every process holds the whole model; one flat all-reduce sums the gradients of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cpm_bee.distributed.process_group import exchange
from cpm_bee.engine.parallel_strategy import ParallelStrategy
from cpm_bee.model.network import CPMBee


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
        flat = torch.cat([g.reshape(-1) for g in gradients])
        with exchange():
            dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        return value
