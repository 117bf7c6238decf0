"""The torch engine: one process, or several under torchrun with gloo or NCCL."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from cpm_bee.engine import OptimizerSettings, StepResult, TensorStatistics
from cpm_bee.errors import RunError
from cpm_bee.launch import Place
from cpm_bee.model.network import CPMBee

_BETAS, _EPS = (0.9, 0.999), 1e-8
# Below this an overflow is no question of scale: the gradients themselves are broken.
_SMALLEST_SCALE = 2.0**-20
_TIMEOUT = datetime.timedelta(minutes=30)  # the first rank may be making a token index


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """The end of one process shows in the others as an error of their next exchange."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"another process of this run has ended ({reason})") from error


class TorchEngine:
    """See `engine.Engine`. Gradients are summed over ranks once a step, in one flat tensor."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        place = Place.of_this_process()
        self.rank, self.world_size = place.rank, place.world_size
        self.dtype = dtype
        self.device = device
        if device.type == "cuda" and self.world_size > 1:
            self.device = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=_TIMEOUT)
            except (RuntimeError, ValueError) as error:
                raise RunError(f"the processes do not find each other: {error}") from None

    @property
    def loss_scale(self) -> float:
        return self._loss_scale

    def prepare(self, model: CPMBee, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=0.0,
            betas=_BETAS,
            eps=_EPS,
            weight_decay=settings.weight_decay,
        )
        self._loss_scale = settings.loss_scale if self.dtype == torch.float16 else 1.0
        self._good_steps = 0
        self._has_stale_gradients = False

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self._drop_stale_gradients()
        (loss * self._loss_scale).backward()

    def _drop_stale_gradients(self) -> None:
        # Gradients outlive their step, for `statistics`.
        if self._has_stale_gradients:
            self._optimizer.zero_grad(set_to_none=True)
            self._has_stale_gradients = False

    def step(self, lr: float) -> StepResult:
        self._drop_stale_gradients()  # those of the last step, where this rank had no records
        parameters = list(self._trained.values())
        gradients = []
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        self._sum(gradients)
        if self._loss_scale != 1:
            torch._foreach_mul_(gradients, 1 / self._loss_scale)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_grad))
        self._has_stale_gradients = True
        if not math.isfinite(norm):
            self._shrink_scale()
            return StepResult(norm, skipped=True)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._good_steps += 1
        if self.dtype == torch.float16 and self._good_steps >= self._settings.loss_scale_steps:
            self._loss_scale *= self._settings.loss_scale_factor
            self._good_steps = 0
        return StepResult(norm, skipped=False)

    def _shrink_scale(self) -> None:
        if self.dtype != torch.float16:
            raise RunError("the gradients are not finite (NaN or infinite)")
        self._loss_scale /= self._settings.loss_scale_factor
        self._good_steps = 0
        if self._loss_scale < _SMALLEST_SCALE:
            raise RunError(
                f"the gradients overflow at every loss scale down to {self._loss_scale:g}; "
                "--dtype bf16 or fp32 has the range"
            )

    def _sum(self, gradients: list[torch.Tensor]) -> None:
        if self.world_size == 1:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        with _lost_processes():
            dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def reduce(self, values: Sequence[float]) -> list[float]:
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        return self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)

    def _reduce(self, values: torch.Tensor, operation: Any) -> list[Any]:
        if self.world_size > 1 and len(values):
            values = values.to(self.device)
            with _lost_processes():
                dist.all_reduce(values, operation)
        return values.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            with _lost_processes():
                dist.barrier()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self._trained.items()}

    def training_state(self) -> dict[str, Any]:
        return {
            "tensors": self.trained_tensors(),
            "optimizer": self._optimizer.state_dict(),
            "loss_scale": self._loss_scale,
            "good_steps": self._good_steps,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        if {n: t.shape for n, t in state["tensors"].items()} != {
            n: p.shape for n, p in self._trained.items()
        }:
            raise RunError("the saved state has other trained tensors than this run")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state["tensors"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self._settings.weight_decay
        if self.dtype == torch.float16:
            self._loss_scale = state["loss_scale"]
            self._good_steps = state["good_steps"]

    @torch.no_grad()
    def statistics(self) -> list[TensorStatistics]:
        return [
            TensorStatistics(
                name,
                tuple(p.shape),
                p.mean().item(),
                p.std(correction=0).item(),
                0.0 if p.grad is None else p.grad.norm().item(),
            )
            for name, p in self._trained.items()
        ]

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
