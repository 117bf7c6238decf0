"""AdamW over named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8


class State(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor
    step: torch.Tensor  # (), fp32


class AdamW:
    """PyTorch's AdamW step, with decoupled weight decay (Loshchilov and Hutter, 2019).

    It does not use `torch.optim.Optimizer`, which loads the compiler and so takes 70 MB of memory.

    Args:
        parameters: the parameters by name.

    Attributes:
        state: the moments and the number of steps of each parameter, by name.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self.state = {
            name: State(
                torch.zeros_like(p),
                torch.zeros_like(p),
                torch.zeros((), dtype=torch.float32, device=p.device),
            )
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def step(
        self,
        parameters: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        lr: float,
    ) -> None:
        """Update the parameters in place."""
        names = [name for name, p in parameters.items() if p.numel()]
        adamw(
            [parameters[name] for name in names],
            [gradients[name] for name in names],
            [self.state[name].first for name in names],
            [self.state[name].second for name in names],
            [],
            [self.state[name].step for name in names],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=self._weight_decay,
            eps=EPS,
            maximize=False,
        )
