"""One layer of the model, and the only place that chooses how a layer is computed.

`TransformerBlock.forward` computes a layer in one of three ways, all with the same result:

- with `frozen.block`, whose custom backward pass keeps less, if only LoRA is trained;
- with PyTorch's autograd, if weights are trained or there is dropout;
- with a compiled form of the latter, if `compiled.compile_blocks` has set one.

Activation checkpointing works with all of them. How a layer runs is changed through attributes:
`compiled_layer` (torch.compile) or `context` (bmtrain's autocast). Nothing replaces `forward`,
because wrappers such as FSDP and bmtrain hook into it.

Pruned layers need no special case: `network.BlockStack` passes `queries` only to a layer that has
an attention block, or indexes the states itself if no layer has one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import block as frozen_block
from cpm_bee.model.layers import AttentionBlock, AttentionFunction, FeedForwardBlock


class TransformerBlock(nn.Module):
    """One layer; in pruned models it may lack its attention, its feed-forward block or both.

    Attributes:
        checkpointing: whether to recompute activations in the backward pass.
        compiled_layer: a compiled form of this layer's `run_blocks` to use instead, with the
            arguments of `forward`; None if not compiled.
        context: returns the context manager in which `forward` runs.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_att = AttentionBlock(config) if config.has_attention(layer) else None
        self.ffn = FeedForwardBlock(config) if config.has_ffn(layer) else None
        self.checkpointing = False
        self.compiled_layer: Callable[..., torch.Tensor] | None = None
        self.context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    # Call with positional arguments only: bmtrain's blocks pass on no others.
    def forward(
        self, h: torch.Tensor, attend: AttentionFunction, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """h [T, dim_model] -> [T, dim_model], or [N, dim_model] at the N positions `queries`."""
        needs_graph = torch.is_grad_enabled()
        compute = self.compiled_layer or self.layer_output
        with self.context():
            if needs_graph and self.compiled_layer is None and frozen_block.is_frozen(self):
                return frozen_block.frozen_block(
                    self.self_att,
                    self.ffn,
                    self.layer,
                    h,
                    attend,
                    queries,
                    recompute=self.checkpointing,
                )
            if needs_graph and self.checkpointing:
                recomputed: torch.Tensor = checkpoint(
                    compute, h, attend, queries, use_reentrant=False
                )
                return recomputed
            return compute(h, attend, queries)

    def layer_output(
        self, h: torch.Tensor, attend: AttentionFunction, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the layer with PyTorch's autograd."""
        return run_blocks(self.self_att, self.ffn, self.layer, h, attend, queries)


def run_blocks(
    attention: AttentionBlock | None,
    feed_forward: FeedForwardBlock | None,
    layer: int,
    h: torch.Tensor,
    attend: AttentionFunction,
    queries: torch.Tensor | None,
) -> torch.Tensor:
    """Compute a layer from its blocks; torch.compile compiles this function once for all layers."""
    if attention is not None:
        h = attention(h, layer, attend, queries)
    return h if feed_forward is None else feed_forward(h)
