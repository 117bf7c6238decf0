"""How the processes of the torch engine divide a model: the interface, and the choice.

`ddp.DDPStrategy`: each process has the whole model. `fsdp.FSDPStrategy`: each has a part of every
tensor. The engine does everything else alike for both, on this process's parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpm_bee.engine.device import free_memory
from cpm_bee.model.network import CPMBee

AUTO, DDP, FSDP = "auto", "ddp", "fsdp"

# The share of the free memory that weights and optimizer state may take before auto shards them;
# the rest is for activations.
_STATIC_SHARE = 0.5
# A trained fp32 value has a gradient and two moments beside it.
_COPIES_OF_TRAINED = 4


class ParallelStrategy(ABC):
    """What the torch engine asks about tensors that may be divided between processes."""

    lockstep: bool  # see `Engine.lockstep`

    @abstractmethod
    def distribute(self, model: CPMBee) -> None:
        """Reduce a model to this process's part, on its device; collective."""

    @abstractmethod
    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a parameter or gradient; shares its memory.

        Not to be kept: PyTorch may lay a parameter elsewhere before the first pass.
        """

    @abstractmethod
    def whole(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU from its parts, divided as parameter `like` is.

        Collective; complete on rank 0.
        """

    @abstractmethod
    def part_of(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, divided as parameter `like` is."""

    @abstractmethod
    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Sum gradients over processes, in place, where the backward pass has not; collective."""

    @abstractmethod
    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over a whole tensor from the sum over this process's part; collective."""


class ParallelChoice(NamedTuple):
    kind: str  # ddp or fsdp
    reason: str  # with the figures


def choose_parallel(
    wanted: str, model: CPMBee, device: torch.device, num_processes: int
) -> ParallelChoice:
    """What `--parallel` means on several processes, as far as this process can tell.

    Args:
        wanted: auto, ddp or fsdp; auto shards a model that, with its gradients and moments, takes
            more than half of the memory that a process can have.
        model: may be on the meta device.
    """
    if wanted != AUTO:
        return ParallelChoice(wanted, "as asked")
    needed = sum(
        p.nbytes * (_COPIES_OF_TRAINED if p.requires_grad else 1) for p in model.parameters()
    )
    available = free_memory(device, num_processes)
    figures = (
        f"{needed / 2**30:.2f} GiB of weights and optimizer state, {available / 2**30:.2f} GiB free"
    )
    return ParallelChoice(FSDP if needed > _STATIC_SHARE * available else DDP, figures)


def parallel_summary(choice: ParallelChoice, offload: bool) -> str:
    """A choice for several processes, for people."""
    if choice.kind == FSDP:
        location = ", in host memory" if offload else ""
        return f"parallel fsdp, each process with a part of every tensor{location}: {choice.reason}"
    return f"parallel ddp, each process with the whole model: {choice.reason}"
