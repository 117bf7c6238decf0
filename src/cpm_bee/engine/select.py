"""Chooses the engine of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpm_bee import quantize
from cpm_bee.engine import bmtrain_engine
from cpm_bee.engine.parallel_strategy import FSDP, choose_parallel, parallel_summary
from cpm_bee.engine.protocol import Engine
from cpm_bee.engine.torch_engine import ONE_PROCESS, TorchEngine
from cpm_bee.errors import InputError
from cpm_bee.model.network import CPMBee

AUTO, TORCH, BMTRAIN = "auto", "torch", "bmtrain"


def choose_engine(
    wanted: str, device: torch.device, quantized: str, torch_only: Sequence[str]
) -> str:
    """Choose the engine, torch or bmtrain; auto is torch.

    Args:
        wanted: `--engine`.
        quantized: `--quantize`.
        torch_only: the given flags that only the torch engine supports.

    Raises:
        InputError: bmtrain was requested but cannot be used.
    """
    if wanted != BMTRAIN:
        return TORCH
    if quantized != quantize.NONE:
        reason: str | None = f"cannot hold a quantized base (--quantize {quantized})"
    elif torch_only:
        reason = f"does not support {', '.join(torch_only)}; --engine torch does"
    else:
        reason = bmtrain_engine.unavailable_reason(device)
    if reason is not None:
        raise InputError(f"--engine bmtrain: {reason}")
    return BMTRAIN


def make_engine(chosen: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """Make the engine that `choose_engine` chose, and join the other processes, if any."""
    if chosen == BMTRAIN:
        return bmtrain_engine.BMTrainEngine(device, dtype)
    return TorchEngine(device, dtype)


def expected_distribution(
    chosen: str,
    parallel: str,
    offload: bool,
    model: CPMBee,
    device: torch.device,
    num_processes: int,
) -> tuple[str, bool]:
    """Returns what `Engine.load_model` and `Engine.lockstep` would return, without an engine.

    It does not know about other processes with less memory.
    """
    if chosen == BMTRAIN:
        return bmtrain_engine.DISTRIBUTION, True
    if num_processes == 1:
        return ONE_PROCESS, False
    choice = choose_parallel(parallel, model, device, num_processes)
    return parallel_summary(choice, offload), choice.kind == FSDP
