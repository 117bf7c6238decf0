"""The engine interface: all that the trainer and its set-up know about an engine.

An engine is one process of a run. It is used in this order: `load_model` gives the model its
values, `prepare` takes it over for training, then `autocast`, `backward` and `step` train it, and
`close` ends it. "Collective" means that all processes must make the call, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import PretrainedModel


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, clipping by global norm, dynamic loss scale (docs/format.md §8)."""

    weight_decay: float
    clip_grad: float
    loss_scale: float
    loss_scale_factor: float
    loss_scale_steps: int


class StepResult(NamedTuple):
    """`grad_norm` is the norm before clipping; it is not finite if the step was skipped."""

    grad_norm: float
    skipped: bool


# Below this scale, an overflow means that the gradients themselves are broken.
_SMALLEST_SCALE = 2.0**-20


def shrunk_scale(scale: float, dtype: torch.dtype, factor: float) -> float:
    """Returns the loss scale after an overflow. Raises `RunError` if a smaller one cannot help."""
    if dtype != torch.float16:
        raise RunError("the gradients are not finite (NaN or infinite)")
    scale /= factor
    if scale < _SMALLEST_SCALE:
        raise RunError(
            f"the gradients overflow at every loss scale down to {scale:g}; "
            "--dtype bf16 and fp32 have a larger range"
        )
    return scale


class TensorStatistics(NamedTuple):
    """Statistics of one trained tensor after a step; `grad_norm` is the norm after clipping."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    grad_norm: float


class Engine(Protocol):
    """One process of a run on `world_size` processes."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # compute type
    name: str  # for people

    @property
    def lockstep(self) -> bool:
        """Whether all processes must run the same number of passes, as they exchange weights."""

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1 if none is used (any type except fp16)."""

    def load_model(self, pretrained: PretrainedModel, parallel: str, offload: bool) -> str:
        """Load the values of `open_pretrained`'s model, now or in `prepare`.

        Collective.

        Args:
            parallel: auto, ddp or fsdp.
            offload: keep the parts of fsdp in host memory.

        Returns:
            A line for people: how the model is distributed, and why.
        """

    def prepare(self, model: CPMBee, settings: OptimizerSettings) -> None:
        """Take over a model. Its tensors that require gradients will be trained."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a loss: this rank's share of the step's mean loss."""

    def step(self, lr: float) -> StepResult:
        """Sum gradients over ranks, clip them, and update unless they overflowed; collective."""

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over all ranks, on every rank; collective."""

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        """Returns the maximum of each value over all ranks, on every rank; collective."""

    def barrier(self) -> None:
        """Wait for all ranks; collective."""

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Returns all trained tensors on the CPU, by name; collective, complete on rank 0."""

    def training_state(self) -> dict[str, Any]:
        """Returns what `load_training_state` needs to continue; collective, complete on rank 0."""

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`, on any number of ranks."""

    def statistics(self) -> list[TensorStatistics]:
        """Returns statistics of the trained tensors after a step; collective."""

    def close(self) -> None:
        """Leave the process group."""
