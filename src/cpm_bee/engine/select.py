"""Which engine a run uses."""

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
    """The engine of `--engine`, torch or bmtrain; auto takes bmtrain where it can be used.

    Args:
        quantized: `--quantize`.
        torch_only: the flags that were given and that only the torch engine has.

    Raises:
        InputError: bmtrain was asked for and cannot be used.
    """
    if wanted == TORCH:
        return TORCH
    if quantized != quantize.NONE:
        reason: str | None = f"cannot hold a quantised base (--quantize {quantized})"
    elif torch_only:
        reason = f"has no {', '.join(torch_only)}; --engine torch has"
    else:
        reason = bmtrain_engine.unavailable_reason(device)
    if wanted == BMTRAIN and reason is not None:
        raise InputError(f"--engine bmtrain: {reason}")
    return TORCH if reason is not None else BMTRAIN


def make_engine(chosen: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine that `choose_engine` chose; joins the other processes, if there are any."""
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
    """What `Engine.load_model` would return and `Engine.lockstep` would be, without an engine.

    Other processes with less memory are not known about.
    """
    if chosen == BMTRAIN:
        return bmtrain_engine.DISTRIBUTION, True
    if num_processes == 1:
        return ONE_PROCESS, False
    choice = choose_parallel(parallel, model, device, num_processes)
    return parallel_summary(choice, offload), choice.kind == FSDP
