"""CPM-Bee: embedding, blocks, and logits at the targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.model import flex_attention
from cpm_bee.model.attention import GroupedAttention, GroupLayout, PositionBias
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import Attend, Embedding, RMSNorm
from cpm_bee.model.loss import OutputHead, Scores, TargetLoss, score


class BlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_layers))
        self.output_layernorm = RMSNorm(config.dim_model, config.eps)
        # The last layer with attention: after it, no position matters to another.
        self._last = max(
            (i for i in range(config.num_layers) if config.has_attention(i)), default=0
        )

    def set_checkpointing(self, wanted: bool) -> None:
        """Whether layers compute their activations again in the backward pass."""
        for layer in self.layers:
            assert isinstance(layer, TransformerBlock)
            layer.checkpointing = wanted

    def forward(
        self,
        h: torch.Tensor,
        attend: Attend,
        attend_last: Attend | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h [T, dim_model] -> [T, dim_model], before the last norm.

        With `queries`, positions [N], the last attention and what follows it compute these alone,
        with `attend_last`, and the result is [N, dim_model].
        """
        for i, layer in enumerate(self.layers):
            attention = (attend_last or attend, queries) if i == self._last else (attend, None)
            h = layer(h, *attention)
        return h


class CPMBee(nn.Module):
    """The language model. Its state dict has the native checkpoint names (docs/format.md §6).

    Made without values: `base.load_pretrained` gives it some.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = "auto"  # auto, sdpa or flex
        self.input_embedding = Embedding(config)
        self.position_bias = PositionBias(config)
        self.encoder = BlockStack(config)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The states after the last norm, [T, dim_model]."""
        h = self.input_embedding(batch.ids, batch.subs)  # (T, dim_model)
        h = self.encoder(h, self._attention(batch, h))
        return self.encoder.output_layernorm(h)

    def target_states(self, batch: Batch) -> torch.Tensor:
        """The states after the last norm at the targets alone, [N, dim_model]."""
        h = self.input_embedding(batch.ids, batch.subs)  # (T, dim_model)
        at_targets = self._attention(batch, h, at_targets=True)
        h = self.encoder(h, self._attention(batch, h), at_targets, batch.target_positions)
        return self.encoder.output_layernorm(h)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits at the targets alone, [N, vocab_size + E]."""
        h = self.target_states(batch)
        return self.input_embedding.logits(h, batch.extension_ids, batch.extension_subs)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the targets, in fp32; a scalar."""
        if self.input_embedding.weight.requires_grad:
            return target_loss(self(batch), batch)
        return TargetLoss.apply(self.target_states(batch), self._output_head(batch), batch.targets)

    def score(self, batch: Batch) -> Scores:
        """The loss of each target and whether it is the most probable token; no gradients."""
        with torch.no_grad():
            return score(self.target_states(batch), self._output_head(batch), batch.targets)

    def _output_head(self, batch: Batch) -> OutputHead:
        embedding = self.input_embedding
        table = embedding(batch.extension_ids, batch.extension_subs)
        return OutputHead(embedding.weight, embedding.scale, table)

    def _attention(self, batch: Batch, h: torch.Tensor, *, at_targets: bool = False) -> Attend:
        dropout_p = self.config.dropout_p if self.training else 0.0
        if flex_attention.is_chosen(self.attention, h.device, dropout_p):
            return flex_attention.FlexAttention(batch, self.position_bias, at_targets=at_targets)
        layout = GroupLayout.of(batch, self.position_bias, at_targets=at_targets)
        return GroupedAttention(layout, self.position_bias, _compute_dtype(h), dropout_p)


def _compute_dtype(h: torch.Tensor) -> torch.dtype:
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def target_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy summed over the targets, in fp32; a scalar."""
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
