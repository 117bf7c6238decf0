"""Delta tuning: LoRA inserted into, trained on, saved from and loaded into a model (SPEC §7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.errors import InputError
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee

# The Linear layers that can carry a delta, by the last part of their name.
TARGETS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")


@dataclass(frozen=True)
class DeltaConfig:
    """Rank r and alpha of (alpha/r) (x Aᵀ) Bᵀ, the layers it is added to, dropout of x."""

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("project_q", "project_v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            raise InputError(
                f"--delta-targets: {', '.join(unknown) or 'nothing'} is no layer of the model; "
                f"choose from {', '.join(TARGETS)}"
            )


class LoRA(nn.Module):
    """The low-rank path beside a Linear. Unlike the base path it is not divided by sqrt(dim_in)."""

    def __init__(self, linear: Linear, config: DeltaConfig) -> None:
        super().__init__()
        dim_out, dim_in = linear.weight.shape
        # fp32 whatever the base: a 16-bit weight would lose most steps of a small learning rate.
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, dim_in, device=device))
        self.lora_B = nn.Parameter(torch.empty(dim_out, config.rank, device=device))
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = sqrt(5), which is U(±1/sqrt(dim_in)); B zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        values = torch.rand(self.lora_A.shape, generator=generator) * 2 - 1
        self.lora_A.copy_(values * bound)
        self.lora_B.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        return F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scale


def insert(model: CPMBee, config: DeltaConfig, seed: int) -> None:
    """Freeze the model and add a LoRA, the only part to be trained, to each target layer."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in config.targets:
            module.lora = LoRA(module, config)
            module.lora.initialize(generator)


def state(model: CPMBee) -> dict[str, torch.Tensor]:
    """The delta's tensors by their names in a delta file (SPEC §7)."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora." in name}
