"""The interface that the trainer and its set-up use; they know nothing else about an engine.

An engine is one process of a run. It is used in this order: `load_model` gives the model its
values, `prepare` takes it over for training, then `autocast`, `backward` and `step` train it, and
`close` ends it. "Collective" means that all processes must call, in the same order.
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
    """`grad_norm` is the norm before clipping; not finite if the step was skipped."""

    grad_norm: float
    skipped: bool


# Below this an overflow is no question of scale: the gradients themselves are broken.
_SMALLEST_SCALE = 2.0**-20


def shrunk_scale(scale: float, dtype: torch.dtype, factor: float) -> float:
    """The loss scale after an overflow. Raises `RunError` where a smaller one is of no use."""
    if dtype != torch.float16:
        raise RunError("the gradients are not finite (NaN or infinite)")
    scale /= factor
    if scale < _SMALLEST_SCALE:
        raise RunError(
            f"the gradients overflow at every loss scale down to {scale:g}; "
            "--dtype bf16 or fp32 has the range"
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
        """Whether the processes exchange weights in every pass, so that all must make as many."""

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 where none is used (any type but fp16)."""

    def load_model(self, pretrained: PretrainedModel, parallel: str, offload: bool) -> str:
        """Load the values of `open_pretrained`'s model, now or in `prepare`.

        Collective.

        Args:
            parallel: auto, ddp or fsdp.
            offload: keep the parts of fsdp in host memory.

        Returns:
            How the model is distributed and why, for people.
        """

    def prepare(self, model: CPMBee, settings: OptimizerSettings) -> None:
        """Take over a model on its device: its tensors that require gradients will be trained."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, this rank's share of the step's mean loss."""

    def step(self, lr: float) -> StepResult:
        """Sum gradients over ranks, clip, and update at a learning rate, unless they overflowed."""

    def reduce(self, values: Sequence[float]) -> list[float]:
        """The sums of values over all ranks, on every rank."""

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest of each of the values over all ranks, on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """All trained tensors on the CPU, by name; collective, complete on rank 0."""

    def training_state(self) -> dict[str, Any]:
        """What `load_training_state` needs to go on exactly; collective, complete on rank 0."""

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`, on any number of ranks."""

    def statistics(self) -> list[TensorStatistics]:
        """Statistics of the trained tensors, after a step; collective."""

    def close(self) -> None:
        """Leave the process group."""
