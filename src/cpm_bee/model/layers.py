"""The layers of docs/format.md §5. Their module names give the native checkpoint names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.model.config import ModelConfig


class AttentionFunction(Protocol):
    """Computes softmax(q kᵀ / sqrt(dim_head) + bias) v in one layer, for N queries and T keys.

    The layers project q, k and v; this function decides what differs between training and
    generation: which keys a query sees, the bias, the kernel, and the source of the keys.
    """

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /
    ) -> torch.Tensor:
        """q [N, heads, dim_head], k and v [T, heads, dim_head] -> [N, heads, dim_head]."""
        ...


RESIDUAL_SCALE = 1 / 1.05

# Up to this number of rows, E hᵀ takes a quarter to half of the time of h Eᵀ on a CPU.
_FEW_ROWS = 8
# With more rows, h Eᵀ is fastest on a CPU in pieces of so many tokens: they stay in the cache.
_VOCABULARY_PIECE = 1024


class Linear(nn.Module):
    """y = (x Wᵀ) / sqrt(dim_in), plus the low-rank path of a delta if there is one.

    Attributes:
        is_traceable: whether torch.compile can trace `base`.
        outside_graph: where it cannot, what a compiled layer calls instead of `base`.
    """

    is_traceable = True
    outside_graph: Callable[[Linear, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.dim_in, self.dim_out = dim_in, dim_out
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.scale = 1 / math.sqrt(dim_in)
        self.lora: Any = None  # a delta.LoRA

    def operands(self) -> tuple[torch.Tensor, ...]:
        """The tensors from which `dense` computes W; a quantized layer has others."""
        return (self.weight,)

    def dense(self, operands: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns W [dim_out, dim_in] in a dtype, from `operands`."""
        return operands[0].to(dtype)

    def pieces(
        self, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields W in pieces, (rows, values [rows, dim_in]); only one need be in memory."""
        yield slice(None), self.dense(operands, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.base(x) if self.outside_graph is None else self.outside_graph(self, x)
        y = product * self.scale
        return y if self.lora is None else y + self.lora(x)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x Wᵀ."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) in fp32, cast back to x's dtype, times weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Embedding(nn.Module):
    """The tied token embedding; a sub > 0 rotates it (rotary embedding)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim_model))
        self.dim = config.dim_model
        self.scale = 1 / math.sqrt(config.dim_model)
        self.distance_scale = config.distance_scale

    def forward(self, ids: torch.Tensor, subs: torch.Tensor) -> torch.Tensor:
        """ids, subs [T] -> [T, dim_model]."""
        e = F.embedding(ids, self.weight) * self.scale
        rotated = torch.nonzero(subs).squeeze(1)  # sub 0 changes nothing
        if len(rotated):
            e = e.index_copy(0, rotated, self._rotate(e[rotated], subs[rotated]))
        return e

    def _rotate(self, e: torch.Tensor, subs: torch.Tensor) -> torch.Tensor:
        exponent = torch.arange(0, self.dim, 2, device=e.device, dtype=torch.float32) / self.dim
        angle = self.distance_scale * subs.float()[:, None] * 10000.0**-exponent  # (T, dim/2)
        angle = torch.cat([angle, angle], dim=-1)
        first, second = e.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return (e * angle.cos() + rotated * angle.sin()).to(e.dtype)

    def logits(
        self, h: torch.Tensor, extension_ids: torch.Tensor, extension_subs: torch.Tensor
    ) -> torch.Tensor:
        """h [N, dim_model] -> [N, vocab_size + E]: vocabulary, then the extension entries."""
        h_scaled = h * self.scale
        if len(h) <= _FEW_ROWS:
            vocabulary = (self.weight @ h_scaled.mT).mT
        else:
            vocabulary = F.linear(h_scaled, self.weight)
        if not len(extension_ids):
            return vocabulary
        table = self(extension_ids, extension_subs)  # (E, dim_model), already scaled
        return torch.cat([vocabulary, F.linear(h, table.to(h.dtype))], dim=-1)

    def vocabulary_logits(self, h: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits of the vocabulary for h [N, dim_model] into out [N, vocab_size]."""
        h = h * self.scale
        if len(h) <= _FEW_ROWS:
            out.copy_((self.weight @ h.mT).mT)
            return
        piece = _VOCABULARY_PIECE if h.device.type == "cpu" else len(self.weight)
        for weight, part in zip(self.weight.split(piece), out.split(piece, dim=1), strict=True):
            torch.mm(h, weight.mT, out=part)


class Attention(nn.Module):
    """The projections around an attention function, which is passed to `forward`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.dim_head
        self.project_q = Linear(config.dim_model, inner)
        self.project_k = Linear(config.dim_model, inner)
        self.project_v = Linear(config.dim_model, inner)
        self.attention_out = Linear(inner, config.dim_model)
        self.heads = (config.num_heads, config.dim_head)

    def forward(
        self, x: torch.Tensor, layer: int, attend: AttentionFunction, queries: torch.Tensor | None
    ) -> torch.Tensor:
        query_inputs = x if queries is None else x[queries]
        q = self.project_q(query_inputs).unflatten(-1, self.heads)  # (N, H*D) -> (N, H, D)
        k = self.project_k(x).unflatten(-1, self.heads)  # (T, H*D) -> (T, H, D)
        v = self.project_v(x).unflatten(-1, self.heads)
        return self.attention_out(attend(layer, q, k, v).flatten(-2))  # (N, H*D) -> (N, dim_model)


class AttentionBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layernorm_before_attention = RMSNorm(config.dim_model, config.eps)
        self.self_attention = Attention(config)
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(
        self, h: torch.Tensor, layer: int, attend: AttentionFunction, queries: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.self_attention(self.layernorm_before_attention(h), layer, attend, queries)
        h = h if queries is None else h[queries]
        return (h + self.dropout(x)) * RESIDUAL_SCALE


class GatedInput(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_0 = Linear(config.dim_model, config.dim_ff)
        self.w_1 = Linear(config.dim_model, config.dim_ff)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.w_0(x)) * self.w_1(x)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_in = GatedInput(config)
        self.dropout = nn.Dropout(config.dropout_p)
        self.w_out = Linear(config.dim_ff, config.dim_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_out(self.dropout(self.w_in(x)))


class FeedForwardBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layernorm_before_ffn = RMSNorm(config.dim_model, config.eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_p)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return (h + self.dropout(self.ffn(self.layernorm_before_ffn(h)))) * RESIDUAL_SCALE
