"""Gradient clipping by the global norm, for the torch engine and the memory estimate."""

from __future__ import annotations

from collections.abc import Callable

import torch


@torch.no_grad()
def clip_by_global_norm(
    gradients: list[torch.Tensor],
    max_norm: float,
    sum_of_parts: Callable[[torch.Tensor], torch.Tensor] = lambda square: square,
) -> float:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    Args:
        gradients: this process's parts of all gradients, in fp32.
        sum_of_parts: returns the sum over all processes of this process's sum of squares.

    Returns:
        The norm before clipping. If it is not finite, the gradients cannot be used.
    """
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = sum_of_parts(norms.double().square().sum()).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(norms))
    return float(norm)
