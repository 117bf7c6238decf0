"""The CUDA kernels of bitsandbytes for NF4; used where they work, never required.

Uses `functional.QuantState`, `functional.dequantize_4bit` and `matmul_4bit` (API of version 0.50).
They take the codes as one column and the scales of all blocks as a vector, which is how our
tensors are laid out in memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch

_BLOCK = 64

logger = logging.getLogger(__name__)


@functools.cache
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes is installed and computes correctly on a device in a type.

    An installed package may have no library for this version of CUDA, or no kernel for this GPU.
    The first call imports it, which takes seconds, and tries a small matrix.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    try:
        reason = None if _is_correct(device, dtype) else "wrong results"
    except Exception as error:  # whatever a broken installation raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason is not None:
        logger.warning(
            "bitsandbytes does not work on %s in %s (%s): this project's own code computes "
            "the products",
            device,
            str(dtype).removeprefix("torch."),
            reason,
        )
    return reason is None


@torch.no_grad()
def _is_correct(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare both kernels with values that every type represents exactly."""
    # The first, middle and last code are -1, 0 and 1; a byte encodes two.
    row = torch.tensor([0xF0, 0x7F, 0x07, 0x0F], dtype=torch.uint8).repeat(16)
    codes = torch.stack([row, row.flip(0)]).repeat(32, 1)  # (64, 64)
    absmax = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(32).view(64, 2)
    high_low = torch.stack([codes >> 4, codes & 15], dim=2).view(64, 128)
    sign = (high_low == 15).float() - (high_low == 0).float()
    weight = sign * absmax.repeat_interleave(_BLOCK, dim=1)  # (64, 128)
    x = torch.zeros(2, 128)
    x[0, 3] = x[1, 127] = 1
    x[:, 70] = 2
    with torch.autocast(device.type, enabled=False):
        codes, absmax = codes.to(device), absmax.to(device)
        results = [(dequantize(codes, absmax, dtype), weight)]
        for rows in (1, 2):  # one row has a kernel of its own
            part = x[:rows].to(device, dtype)
            results.append((product(part, codes, absmax), x[:rows] @ weight.mT))
    return all(torch.equal(found.float().cpu(), expected) for found, expected in results)


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(name)


def _state(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Any:
    return _module("bitsandbytes.functional").QuantState(
        absmax=absmax.float().reshape(-1),
        shape=torch.Size((len(codes), 2 * codes.shape[1])),
        dtype=dtype,
        blocksize=_BLOCK,
        quant_type="nf4",
    )


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns W [dim_out, dim_in] for codes [dim_out, dim_in/2], absmax [dim_out, dim_in/64]."""
    state = _state(codes, absmax, dtype)
    return _module("bitsandbytes.functional").dequantize_4bit(codes.reshape(-1, 1), state)


def product(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Returns x Wᵀ without a gradient and without building W; for a few rows x [N, dim_in]."""
    state = _state(codes, absmax, x.dtype)
    with torch.no_grad():
        return _module("bitsandbytes").matmul_4bit(x, codes.reshape(-1, 1), quant_state=state)
