"""The CUDA kernels of bitsandbytes for NF4; used if available, never required.

Uses `functional.QuantState`, `functional.dequantize_4bit` and `matmul_4bit` (API of version 0.50).
They take the codes as one column and the scales of all blocks as a vector, which is how our
tensors are laid out in memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

_BLOCK = 64


@functools.cache
def available() -> bool:
    """Whether bitsandbytes is installed. Does not import it, because that takes seconds."""
    return importlib.util.find_spec("bitsandbytes") is not None


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
