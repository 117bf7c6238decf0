"""Which engine a run uses."""

from __future__ import annotations

import torch

from cpm_bee import quantize
from cpm_bee.engine import Engine, bmtrain_engine
from cpm_bee.engine.torch_engine import TorchEngine

AUTO, BMTRAIN = "auto", "bmtrain"


def bmtrain_unavailable_reason(
    device: torch.device, quantized: str, extras: dict[str, bool]
) -> str | None:
    """Why a run cannot use bmtrain; None if it can.

    Args:
        quantized: `--quantize`.
        extras: flags that only the torch engine has, and whether they were given.
    """
    if quantized != quantize.NONE:
        return f"cannot hold a quantised base (--quantize {quantized})"
    given = [flag for flag, was_given in extras.items() if was_given]
    if given:
        return f"has no {', '.join(given)}; --engine torch has"
    return bmtrain_engine.unavailable_reason(device)


def make_engine(
    wanted: str, unavailable_reason: str | None, device: torch.device, dtype: torch.dtype
) -> Engine:
    """The engine of `--engine`; auto takes bmtrain where there is no unavailable_reason."""
    if wanted == BMTRAIN or (wanted == AUTO and unavailable_reason is None):
        return bmtrain_engine.BMTrainEngine(device, dtype)
    return TorchEngine(device, dtype)
