"""Finds the tensors of a model with values that are not finite, to name what ended a run."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def not_finite(model: nn.Module, *, only_frozen: bool) -> list[str]:
    """Names of the parameters and buffers with a NaN or infinity in this rank's part of them."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [
        name
        for name, tensor in tensors
        if not (only_frozen and tensor.requires_grad) and not _is_finite(tensor)
    ]


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())
