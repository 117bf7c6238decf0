"""CPM-Bee: embedding, blocks, and logits at the targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cpm_bee.data.batch import Batch
from cpm_bee.model.attention import GroupedAttention, Layout, PositionBias
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import Attend, Embedding, RMSNorm, TransformerBlock


class BlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_layers))
        self.output_layernorm = RMSNorm(config.dim_model, config.eps)
        self.checkpointing = False

    def forward(self, h: torch.Tensor, attend: Attend) -> torch.Tensor:
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, attend, use_reentrant=False)
            else:
                h = layer(h, attend)
        return h


class CPMBee(nn.Module):
    """The language model. Its state dict has the native checkpoint names (SPEC §6).

    Made without values: `base.load_base` gives it some.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedding = Embedding(config)
        self.position_bias = PositionBias(config)
        self.encoder = BlockStack(config)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The states after the last norm, [T, dim_model]."""
        return self.encoder.output_layernorm(self._stream(batch))

    def _stream(self, batch: Batch) -> torch.Tensor:
        h = self.input_embedding(batch.ids, batch.subs)  # (T, dim_model)
        dropout_p = self.config.dropout_p if self.training else 0.0
        dtype = _compute_dtype(h)
        layout = Layout.of(batch, self.position_bias)
        return self.encoder(h, GroupedAttention(layout, self.position_bias, dtype, dropout_p))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits at the targets alone, [N, vocab_size + E]."""
        h = self._stream(batch)[batch.target_positions]  # (N, dim_model)
        h = self.encoder.output_layernorm(h)
        return self.input_embedding.logits(h, batch.extension_ids, batch.extension_subs)


def _compute_dtype(h: torch.Tensor) -> torch.dtype:
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def target_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy summed over the targets, in fp32; a scalar."""
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
