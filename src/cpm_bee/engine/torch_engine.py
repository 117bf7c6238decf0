"""The torch engine: one process, or several under torchrun with gloo or NCCL."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from cpm_bee.distributed import process_group
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.engine.adamw import AdamW
from cpm_bee.engine.clip import clip_by_global_norm
from cpm_bee.engine.ddp import DDPStrategy
from cpm_bee.engine.device import use_device
from cpm_bee.engine.parallel_strategy import (
    FSDP,
    ParallelStrategy,
    choose_parallel,
    parallel_summary,
)
from cpm_bee.engine.protocol import (
    OptimizerSettings,
    StepResult,
    TensorStatistics,
    shrunk_scale,
)
from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import PretrainedModel

ONE_PROCESS = "one process, with the whole model"


class TorchEngine:
    """See `protocol.Engine`. Every process has the whole model, unless `load_model` shards it."""

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        info = RankInfo.of_this_process()
        self.rank, self.world_size = info.rank, info.world_size
        self.dtype = dtype
        if device.type == "cuda" and self.world_size > 1:
            device = torch.device("cuda", info.local_rank)
        self.device = use_device(device)
        if self.world_size > 1:
            process_group.join(self.device)
        self._strategy: ParallelStrategy = DDPStrategy(self.device, self.world_size)

    def load_model(self, pretrained: PretrainedModel, parallel: str, offload: bool) -> str:
        if self.world_size == 1:
            pretrained.materialize(self.device)
            return ONE_PROCESS
        choice = choose_parallel(parallel, pretrained.model, self.device, self.world_size)
        # All must do the same; fsdp needs the least memory.
        if self.reduce_max([int(choice.kind == FSDP)])[0] and choice.kind != FSDP:
            choice = choice._replace(kind=FSDP, reason="another process has less memory")
        if choice.kind == FSDP:
            from cpm_bee.engine.fsdp import FSDPStrategy  # takes a second and 100 MiB

            self._strategy = FSDPStrategy(
                self.device,
                self.world_size,
                pretrained.tensors,
                dtype=self.dtype,
                offload=offload,
            )
        else:
            self._strategy = DDPStrategy(self.device, self.world_size)
            pretrained.materialize(self.device)
        return parallel_summary(choice, offload)

    @property
    def lockstep(self) -> bool:
        return self._strategy.lockstep

    @property
    def loss_scale(self) -> float:
        return self._loss_scale

    def prepare(self, model: CPMBee, settings: OptimizerSettings) -> None:
        """See `Engine.prepare`; the model may be on any device."""
        self._settings = settings
        self._strategy.distribute(model)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = AdamW(self._locals(), settings.weight_decay)
        self._loss_scale = settings.loss_scale if self.dtype == torch.float16 else 1.0
        self._good_steps = 0
        self._has_stale_gradients = False

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with self._in_pass():
            if self.dtype == torch.float32:
                yield
            else:
                with torch.autocast(self.device.type, self.dtype):
                    yield

    def _in_pass(self) -> AbstractContextManager[None]:
        return process_group.exchange() if self.lockstep else contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self._drop_stale_gradients()
        with self._in_pass():
            (loss * self._loss_scale).backward()

    def _locals(self) -> dict[str, torch.Tensor]:
        """This process's parts of the trained tensors."""
        return {name: self._strategy.local(p) for name, p in self._trained.items()}

    def _drop_stale_gradients(self) -> None:
        # Gradients outlive their step, for `statistics`.
        if self._has_stale_gradients:
            for p in self._trained.values():
                p.grad = None
            self._has_stale_gradients = False

    def step(self, lr: float) -> StepResult:
        self._drop_stale_gradients()  # those of the last step, where this rank had no records
        gradients = {}
        for name, p in self._trained.items():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients[name] = self._strategy.local(p.grad)
        self._strategy.sum_gradients(list(gradients.values()))
        if self._loss_scale != 1:
            torch._foreach_mul_(list(gradients.values()), 1 / self._loss_scale)
        norm = clip_by_global_norm(
            list(gradients.values()), self._settings.clip_grad, self._strategy.sum_of_parts
        )
        self._has_stale_gradients = True
        if not math.isfinite(norm):
            self._shrink_scale()
            return StepResult(norm, skipped=True)
        self._optimizer.step(self._locals(), gradients, lr)
        self._good_steps += 1
        if self.dtype == torch.float16 and self._good_steps >= self._settings.loss_scale_steps:
            self._loss_scale *= self._settings.loss_scale_factor
            self._good_steps = 0
        return StepResult(norm, skipped=False)

    def _shrink_scale(self) -> None:
        factor = self._settings.loss_scale_factor
        self._loss_scale = shrunk_scale(self._loss_scale, self.dtype, factor)
        self._good_steps = 0

    def reduce(self, values: Sequence[float]) -> list[float]:
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        return self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)

    def _reduce(self, values: torch.Tensor, operation: Any) -> list[Any]:
        if self.world_size > 1 and len(values):
            values = values.to(self.device)
            with process_group.exchange():
                dist.all_reduce(values, operation)
                return values.tolist()
        return values.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            with process_group.exchange():
                dist.barrier()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        return {n: self._strategy.whole(t, self._trained[n]) for n, t in self._locals().items()}

    def training_state(self) -> dict[str, Any]:
        whole = self._strategy.whole
        moments = {}
        for name, (first, second, step) in self._optimizer.state.items():
            like = self._trained[name]
            moments[name] = {
                "exp_avg": whole(first, like),
                "exp_avg_sq": whole(second, like),
                "step": step.cpu(),
            }
        return {
            "tensors": self.trained_tensors(),
            "optimizer": moments,
            "loss_scale": self._loss_scale,
            "good_steps": self._good_steps,
        }

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        tensors, moments = state["tensors"], state["optimizer"]
        if {n: t.shape for n, t in tensors.items()} != {
            n: p.shape for n, p in self._trained.items()
        }:
            raise RunError("the saved state has other trained tensors than this run")
        for name, local in self._locals().items():
            like, saved, part_of = self._trained[name], moments[name], self._strategy.part_of
            first, second, step = self._optimizer.state[name]
            local.copy_(part_of(tensors[name], like))
            first.copy_(part_of(saved["exp_avg"], like))
            second.copy_(part_of(saved["exp_avg_sq"], like))
            step.copy_(saved["step"])
        if self.dtype == torch.float16:
            self._loss_scale = state["loss_scale"]
            self._good_steps = state["good_steps"]

    @torch.no_grad()
    def statistics(self) -> list[TensorStatistics]:
        return [self._statistics_of(name, p) for name, p in self._trained.items()]

    def _statistics_of(self, name: str, p: torch.Tensor) -> TensorStatistics:
        def total(values: torch.Tensor) -> float:
            return self._strategy.sum_of_parts(values.sum(dtype=torch.float64)).item()

        local = self._strategy.local(p)
        mean = total(local) / p.numel()
        std = math.sqrt(total((local - mean).square()) / p.numel())
        square = 0.0 if p.grad is None else total(self._strategy.local(p.grad).square())
        return TensorStatistics(name, tuple(p.shape), mean, std, math.sqrt(square))

    def close(self) -> None:
        process_group.leave()
