"""The bmtrain engine: ZeRO-3 on CUDA, with the optimizer state on the host.

This is the only file that imports bmtrain, and only when an engine is made. It is written for
bmtrain 1.0.1: tests/engine/test_bmtrain_rules.py tests the behaviour that it relies on, and what
fails silently in bmtrain.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import socket
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from cpm_bee.distributed.rank import RankInfo
from cpm_bee.engine.adamw import BETAS, EPS
from cpm_bee.engine.bmtrain_sharding import part_of, shard_model, whole_of
from cpm_bee.engine.protocol import (
    OptimizerSettings,
    StepResult,
    TensorStatistics,
    shrunk_scale,
)
from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import PretrainedModel

DISTRIBUTION = "ZeRO-3 by bmtrain, each process with a part of every tensor"


def unavailable_reason(device: torch.device) -> str | None:
    """Returns why this engine cannot run on a device, and what to do; None if it can."""
    if device.type != "cuda":
        return "runs on GPUs only; --engine torch runs anywhere"
    if device.index:
        return (
            f"uses the GPU of its local rank, not --device {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and give --device cuda"
        )
    if importlib.util.find_spec("bmtrain") is None:
        return (
            "bmtrain is not installed (Python 3.10 or 3.11): pip install --no-deps bmtrain==1.0.1"
        )
    return None


def _start() -> Any:
    """Import bmtrain and connect the processes."""
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    import bmtrain as bmt

    if bmt.init.is_initialized():
        return bmt
    if RankInfo.of_this_process().world_size == 1 and "MASTER_PORT" not in os.environ:
        # bmtrain's default is a fixed port, so a second run on the machine would fail.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    bmt.init.print_dict = lambda title, content: None  # a block of text from each process
    try:
        bmt.init_distributed()
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes could not connect to each other: {error}") from None
    return bmt


class BMTrainEngine:
    """See `protocol.Engine`. Every process holds a part of each tensor, trained or frozen.

    The processes exchange parts in every pass.

    Weights are held in the compute type, those of a LoRA in fp32. The optimizer keeps an fp32
    copy of the trained weights and its moments on the host.
    """

    name = "bmtrain"
    lockstep = True  # all processes must run the same number of passes, forward and backward

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._bmt = _start()
        self.rank, self.world_size = self._bmt.rank(), self._bmt.world_size()
        self.dtype = dtype
        self.device = device
        if device.type == "cuda":
            self.device = torch.device("cuda", RankInfo.of_this_process().local_rank)

    @property
    def loss_scale(self) -> float:
        return float(self._manager.loss_scale)

    def load_model(self, pretrained: PretrainedModel, parallel: str, offload: bool) -> str:
        """See `Engine.load_model`; `choose_engine` refuses both flags with this engine."""
        pretrained.materialize_mapped()  # `prepare` reads this process's parts
        return DISTRIBUTION

    def prepare(self, model: CPMBee, settings: OptimizerSettings) -> None:
        """See `Engine.prepare`; the model may be in any type, on the CPU and memory-mapped."""
        self._settings = settings
        self._model = model
        self._trained = shard_model(self._bmt, model, self.dtype, self.autocast)
        self._finish_copies()
        self._make_optimizer()

    def _finish_copies(self) -> None:
        """Wait until the GPU has written the parts.

        bmtrain gathers them on its load stream, which waits for the stream that wrote them only
        after a step of the optimizer: the first passes could gather older values.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _make_optimizer(self) -> None:
        wide = [p for p in self._trained.values() if p.dtype == torch.float32]
        narrow = [p for p in self._trained.values() if p.dtype != torch.float32]
        # bmtrain decays 16-bit weights as AdamW does, but fp32 ones through their gradient.
        groups = [
            {"params": wide, "weight_decay": 0.0},
            {"params": narrow, "weight_decay": self._settings.weight_decay},
        ]
        self._optimizer = self._bmt.optim.AdamOffloadOptimizer(
            [g for g in groups if g["params"]], lr=0.0, betas=BETAS, eps=EPS
        )
        self._manager = self._bmt.optim.OptimManager(
            loss_scale=self._settings.loss_scale if self.dtype == torch.float16 else None,
            loss_scale_factor=self._settings.loss_scale_factor,
            loss_scale_steps=self._settings.loss_scale_steps,
            grad_scale=1,  # gradients are summed over ranks, not averaged
        )
        self._manager.add_optimizer(self._optimizer)
        self._steps = 0  # without the skipped ones
        self._gradient_scale = 1.0  # of the gradients left from the last step
        self._has_stale_gradients = False

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self._drop_stale_gradients()
        self._manager.backward(loss)

    def _drop_stale_gradients(self) -> None:
        # Gradients outlive their step, for `statistics`. Setting them to None would leave those of
        # a block in its storage, and the next ones would be added to them.
        if self._has_stale_gradients:
            self._manager.zero_grad()
            self._has_stale_gradients = False

    def step(self, lr: float) -> StepResult:
        self._drop_stale_gradients()
        for part in self._trained.values():
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        groups = self._optimizer.param_groups
        norm = float(self._manager.clip_grad_norm(groups, self._settings.clip_grad))
        self._has_stale_gradients = True
        self._gradient_scale = self.loss_scale
        # bmtrain looks for overflow in 16-bit gradients only; the norm is the same on all ranks.
        if not math.isfinite(norm):
            self._shrink_scale()
            return StepResult(norm, skipped=True)
        for group in groups:
            group["lr"] = lr
        self._decay(lr)
        self._manager.step()
        self._steps += 1
        return StepResult(norm, skipped=False)

    def _shrink_scale(self) -> None:
        factor = self._manager.loss_scale_factor
        self._manager.loss_scale = shrunk_scale(self.loss_scale, self.dtype, factor)
        self._manager.steps_since_last_scale = 0

    @torch.no_grad()
    def _decay(self, lr: float) -> None:
        factor = 1 - lr * self._settings.weight_decay
        for part in self._trained.values():
            if part.dtype == torch.float32:
                # The optimizer updates its copy on the host, once it has made one.
                self._optimizer.state.get(part, {}).get("_param_fp32", part).mul_(factor)

    def reduce(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, torch.float64, "sum")

    def reduce_max(self, values: Sequence[int]) -> list[int]:
        return self._reduce(values, torch.int64, "max")

    def _reduce(self, values: Sequence[Any], dtype: torch.dtype, operation: str) -> list[Any]:
        if not len(values):
            return []
        own = torch.tensor(values, dtype=dtype, device=self.device)
        return list(self._bmt.distributed.all_reduce(own, operation).tolist())

    def barrier(self) -> None:
        self._bmt.synchronize()

    def _whole(self, part: Any, own: torch.Tensor) -> torch.Tensor:
        return whole_of(self._bmt, part, own, self.device)

    def _exact(self, part: Any) -> torch.Tensor:
        """The fp32 values of a part; a 16-bit weight is a rounded copy of them."""
        state = self._optimizer.state.get(part, {})
        return state.get("_param_fp32", part.detach()).float()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        return {name: self._whole(part, self._exact(part)) for name, part in self._trained.items()}

    def training_state(self) -> dict[str, Any]:
        """See `Engine.training_state`; in the torch engine's form, so that either can continue."""
        moments = {}
        for name, part in self._trained.items():
            state = self._optimizer.state.get(part, {})
            nothing = torch.zeros(part.numel())
            moments[name] = {
                "exp_avg": self._whole(part, state.get("exp_avg", nothing)),
                "exp_avg_sq": self._whole(part, state.get("exp_avg_sq", nothing)),
                "step": torch.tensor(float(self._steps)),
            }
        return {
            "tensors": self.trained_tensors(),
            "optimizer": moments,
            "loss_scale": self.loss_scale,
            "good_steps": self._manager.steps_since_last_scale,
        }

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Any]) -> None:
        tensors, moments = state["tensors"], state["optimizer"]
        if {n: t.shape for n, t in tensors.items()} != {
            n: p._original_shape for n, p in self._trained.items()
        }:
            raise RunError("the saved state has other trained tensors than this run")
        self._steps = int(next(iter(moments.values()))["step"])
        own = {}
        for name, part in self._trained.items():
            exact = part_of(part, tensors[name])
            part.copy_(exact)
            own[part] = {
                "step": self._steps,
                "exp_avg": part_of(part, moments[name]["exp_avg"]),
                "exp_avg_sq": part_of(part, moments[name]["exp_avg_sq"]),
                "_param_fp32": exact,
            }
        # The optimizer orders parts by type, not by name.
        ordered = [part for group in self._optimizer.param_groups for part in group["params"]]
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(
            {"state": dict(enumerate(own[part] for part in ordered)), "param_groups": groups}
        )
        self._finish_copies()
        if self.dtype == torch.float16:
            self._manager.loss_scale = state["loss_scale"]
            self._manager.steps_since_last_scale = state["good_steps"]

    def statistics(self) -> list[TensorStatistics]:
        found = self._bmt.inspect.inspect_model(self._model, "*")
        return [self._statistics_of(s) for s in found if s["name"] in self._trained]

    def _statistics_of(self, values: dict[str, Any]) -> TensorStatistics:
        count = math.prod(values["shape"])
        share = (count - 1) / count  # bmtrain divides variances by count - 1
        std, grad_std = (values[n] if count > 1 else 0.0 for n in ("std", "grad_std"))
        mean_square = share * grad_std**2 + values["grad_mean"] ** 2
        return TensorStatistics(
            values["name"],
            tuple(values["shape"]),
            values["mean"],
            math.sqrt(share) * std,
            math.sqrt(count * mean_square) / self._gradient_scale,
        )

    def close(self) -> None:
        # Closing NCCL waits for processes that may be gone; the end of this process does not.
        pass
