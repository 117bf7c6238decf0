"""A model that every process has whole: gradients are summed, once a step, in one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from cpm_bee.distributed.process_group import exchange


class DDPStrategy:
    """How the torch engine deals with parameters where nothing is sharded; see `FSDPStrategy`.

    Args:
        world_size: the number of processes.
    """

    lockstep = False

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size

    def distribute(self, model: nn.Module) -> None:
        """Move a model to the device."""
        model.to(self._device)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a parameter or gradient; shares its memory."""
        return tensor

    def whole(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU from its parts, cut as parameter `like` is; collective."""
        return local.detach().to("cpu", copy=True)

    def part_of(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The part that this process has of parameter `like`, from values of all of it."""
        return whole

    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Sum over processes, in place; collective."""
        if self._world_size == 1:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        with exchange():
            dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        """A sum over all of a tensor from the sum over this process's part of it."""
        return value
