"""One layer of the model, in the way that suits what is trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import block as frozen_block
from cpm_bee.model.layers import Attend, AttentionBlock, FeedForwardBlock


class TransformerBlock(nn.Module):
    """One layer; pruned releases lack its attention, its FFN or both.

    Attributes:
        checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_att = AttentionBlock(config) if config.has_attention(layer) else None
        self.ffn = FeedForwardBlock(config) if config.has_ffn(layer) else None
        self.checkpointing = False

    def forward(
        self, h: torch.Tensor, attend: Attend, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """h [T, dim_model] -> the same; with N `queries`, positions, [N, dim_model] of these."""
        if self.self_att is None and queries is not None:
            h, queries = h[queries], None
        if not torch.is_grad_enabled():
            return self.plain(h, attend, queries)
        if frozen_block.is_frozen(self):
            halves = (self.self_att, self.ffn)
            return frozen_block.block(
                *halves, self.layer, h, attend, queries, recompute=self.checkpointing
            )
        if self.checkpointing:
            return checkpoint(self.plain, h, attend, queries, use_reentrant=False)
        return self.plain(h, attend, queries)

    def plain(
        self, h: torch.Tensor, attend: Attend, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same by PyTorch's own gradients."""
        if self.self_att is not None:
            h = self.self_att(h, self.layer, attend, queries)
        return h if self.ffn is None else self.ffn(h)
