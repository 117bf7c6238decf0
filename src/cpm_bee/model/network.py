"""CPM-Bee: embedding, layers, and logits at the targets or at the next token of an answer.

Training and evaluation (`loss`, `score`) run a `Batch`, a flat stream of records, in one pass.
Generation runs prompts once, also as a `Batch` (`prefill`), then one token of each hypothesis per
step (`decode`); the caller keeps keys and values, see `model/cached_attention.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.model import flex_attention
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.cached_attention import KeyValue
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import AttentionFunction, Embedding, RMSNorm
from cpm_bee.model.loss import Candidates, OutputHead, Scores, TargetLoss, score


class BlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_layers))
        self.output_layernorm = RMSNorm(config.dim_model, config.eps)
        with_attention = [i for i in range(config.num_layers) if config.has_attention(i)]
        self._last_attention = with_attention[-1] if with_attention else None

    def set_checkpointing(self, wanted: bool) -> None:
        """Set whether layers recompute their activations in the backward pass."""
        for layer in self.layers:
            assert isinstance(layer, TransformerBlock)
            layer.checkpointing = wanted

    def forward(
        self,
        h: torch.Tensor,
        attend: AttentionFunction,
        attend_last: AttentionFunction | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h [T, dim_model] -> [T, dim_model], before the last norm.

        With `queries`, positions [N], the result is [N, dim_model]: the last attention block,
        computed with `attend_last`, has only these queries. In a pruned model it need not be in
        the last layer: later layers have no attention, compute each position by itself, and
        continue with [N, dim_model].
        """
        if queries is not None and self._last_attention is None:
            h = h[queries]  # (N, dim_model)
        for i, layer in enumerate(self.layers):
            if queries is not None and i == self._last_attention:
                h = layer(h, attend_last or attend, queries)  # (N, dim_model)
            else:
                h = layer(h, attend)
        return h


class CPMBee(nn.Module):
    """The language model. Its state dict has the native checkpoint names (docs/format.md §6).

    The constructor does not initialise the weights: use `pretrained.load_pretrained`.

    Attributes:
        attention: `flex_attention.SDPA` or FLEX: how `forward`, `loss` and `score` attend.
        context: returns the context manager in which `forward`, `loss` and `score` run.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = flex_attention.SDPA
        self.context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self.input_embedding = Embedding(config)
        self.position_bias = PositionBias(config)
        self.encoder = BlockStack(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits at the targets only, [N, vocab_size + E]."""
        with self.context():
            return self._logits(batch)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the targets, in fp32; a scalar."""
        with self.context():
            if self.input_embedding.weight.requires_grad:
                return target_loss(self._logits(batch), batch)
            states, head = self._target_states(batch), self._output_head(batch)
            return TargetLoss.apply(states, head, batch.targets)

    def score(self, batch: Batch) -> Scores:
        """The loss of each target and whether it is the most probable token; no gradients."""
        with torch.no_grad(), self.context():
            return score(
                self._target_states(batch),
                self._output_head(batch),
                batch.targets,
                _candidates(batch),
                batch.extension_is_own[batch.target_records]
                if batch.extension_is_own is not None
                else None,
            )

    def prefill(self, prompts: Batch, keep: Callable[[int, KeyValue], None]) -> torch.Tensor:
        """The states of the targets after the last norm, [N, dim_model].

        Args:
            prompts: records whose first answer has only its `<s>`, the one target of the record.
            keep: is called with each layer that has attention and its keys and values, (T, H, D).
        """

        def keeping(attend: AttentionFunction) -> AttentionFunction:
            def keep_and_attend(
                layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
            ) -> torch.Tensor:
                keep(layer, KeyValue(k, v))
                return attend(layer, q, k, v)

            return keep_and_attend

        h = self.input_embedding(prompts.ids, prompts.subs)  # (T, dim_model)
        bias, dtype = self.position_bias, _compute_dtype(h)
        attend, attend_last = (
            PaddedAttention(PaddedGroups.of(prompts, bias, at_targets=last), bias, dtype, 0.0)
            for last in (False, True)
        )
        h = self.encoder(h, keeping(attend), keeping(attend_last), prompts.target_positions)
        return self.encoder.output_layernorm(h)

    def decode(
        self, ids: torch.Tensor, subs: torch.Tensor, attend: AttentionFunction
    ) -> torch.Tensor:
        """The states of one token of each of N sequences after the last norm, [N, dim_model].

        Sequences share only the attention: everything else computes each row by itself.
        """
        h = self.encoder(self.input_embedding(ids, subs), attend)
        return self.encoder.output_layernorm(h)

    def _target_states(self, batch: Batch) -> torch.Tensor:
        """The states after the last norm, at the targets only, [N, dim_model]."""
        h = self.input_embedding(batch.ids, batch.subs)  # (T, dim_model)
        attend_last = self.attention_over(batch, h, at_targets=True)
        attend = self.attention_over(batch, h)
        h = self.encoder(h, attend, attend_last, batch.target_positions)
        return self.encoder.output_layernorm(h)

    def _logits(self, batch: Batch) -> torch.Tensor:
        h = self._target_states(batch)
        return self.input_embedding.logits(h, batch.extension_ids, batch.extension_subs)

    def _output_head(self, batch: Batch) -> OutputHead:
        embedding = self.input_embedding
        table = embedding(batch.extension_ids, batch.extension_subs)  # (E, dim_model)
        return OutputHead(embedding.weight, embedding.scale, table)

    def attention_over(
        self, batch: Batch, h: torch.Tensor, *, at_targets: bool = False
    ) -> AttentionFunction:
        """The attention function for states h; with `at_targets`, only targets are queries."""
        if self.attention == flex_attention.FLEX:
            return flex_attention.FlexAttention(batch, self.position_bias, at_targets=at_targets)
        dropout_p = self.config.dropout_p if self.training else 0.0
        groups = PaddedGroups.of(batch, self.position_bias, at_targets=at_targets)
        return PaddedAttention(groups, self.position_bias, _compute_dtype(h), dropout_p)


def _compute_dtype(h: torch.Tensor) -> torch.dtype:
    """The dtype of q, k and v for states h: that of autocast if it is enabled."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def _candidates(batch: Batch) -> Candidates | None:
    """The candidates of generation at each target, if the batch has them."""
    if batch.unk_is_candidate is None or batch.extension_is_candidate is None:
        return None
    own = batch.target_records  # (N,)
    return Candidates(batch.unk, batch.unk_is_candidate[own], batch.extension_is_candidate[own])


def target_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy summed over the targets, in fp32; a scalar."""
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
