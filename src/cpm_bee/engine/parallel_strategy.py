"""How the processes of the torch engine divide a model: the interface, and the choice.

With `ddp.DDPStrategy`, each process has the whole model; with `fsdp.FSDPStrategy`, a part of every
tensor. Everything else in the engine is the same for both, and works on this process's parts.
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
# A trained fp32 value comes with a gradient and two moments.
_COPIES_OF_TRAINED = 4


class ParallelStrategy(ABC):
    """How the torch engine handles tensors that may be divided between processes."""

    lockstep: bool  # see `Engine.lockstep`

    @abstractmethod
    def distribute(self, model: CPMBee) -> None:
        """Reduce a model to this process's part, on its device; collective."""

    @abstractmethod
    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns this process's part of a parameter or gradient, which shares its memory.

        Do not keep it: PyTorch may move a parameter before the first pass.
        """

    @abstractmethod
    def whole(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on the CPU from its parts, divided as parameter `like` is.

        Collective; complete on rank 0.
        """

    @abstractmethod
    def part_of(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns this process's part of a whole tensor, divided as parameter `like` is."""

    @abstractmethod
    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Sum gradients over processes in place, unless the backward pass did; collective."""

    @abstractmethod
    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum over a whole tensor, given that over this process's part; collective."""


class ParallelChoice(NamedTuple):
    kind: str  # ddp or fsdp
    reason: str  # with the figures


def choose_parallel(
    wanted: str, model: CPMBee, device: torch.device, num_processes: int
) -> ParallelChoice:
    """Choose between ddp and fsdp for several processes, as far as this process can tell.

    Args:
        wanted: auto, ddp or fsdp; auto is fsdp if the model with its gradients and moments takes
            more than half of the memory available to a process.
        model: may be on the meta device.
    """
    if wanted != AUTO:
        return ParallelChoice(wanted, "as requested")
    needed = sum(
        p.nbytes * (_COPIES_OF_TRAINED if p.requires_grad else 1) for p in model.parameters()
    )
    available = free_memory(device, num_processes)
    figures = (
        f"{needed / 2**30:.2f} GiB of weights and optimizer state, {available / 2**30:.2f} GiB free"
    )
    return ParallelChoice(FSDP if needed > _STATIC_SHARE * available else DDP, figures)


def parallel_summary(choice: ParallelChoice, offload: bool) -> str:
    """Describes a choice in a line for people."""
    if choice.kind == FSDP:
        location = ", in host memory" if offload else ""
        return f"parallel fsdp, each process with a part of every tensor{location}: {choice.reason}"
    return f"parallel ddp, each process with the whole model: {choice.reason}"
