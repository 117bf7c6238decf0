"""The halves of a frozen layer, attention and feed-forward, with a manual backward pass.

Each object is used for one forward and one backward pass. With L(x) = x Wᵀ, s = 1/sqrt(dim_in) and
c = 1/1.05 (`RESIDUAL_SCALE`), a half computes

    x  = RMSNorm(h) s                    s, the factor of the next Linears, is folded into the norm
    h' = c h + c s_out L_out(f(x))       f: attention of L_q x, L_k x, L_v x, or GELU(L_0 x) * L_1 x

Backward, where g is the gradient of h': the gradient of f(x) is c s_out g W_out; the gradient of x
is the sum of gy W over the Linears that read x, where gy is the gradient of their output; the
gradient of h is that of the norm plus c g from the residual. With r = 1/rms, gx the gradient of x
and u = gx * weight, the gradient of the norm is

    r u - h r³ mean(u h)                 (mean over the features)

Attention is differentiated by autograd: q, k and v begin a graph (`_Begin`), which is kept and
run in `backward`. With `queries`, q and the residual have only these N of T positions.

Every step equals autograd of `model/layers.py` up to rounding. Hazards: tensors are overwritten
after their last use (`out=`, methods that end in `_`), so the order of statements matters; names
are deleted early to free memory for the next product; if the input needs no gradient
(`input_needed`), only those of q, k and v whose Linear has LoRA get one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from cpm_bee.model.frozen.buffers import buffer_pool
from cpm_bee.model.frozen.linear import FrozenLinear
from cpm_bee.model.layers import (
    RESIDUAL_SCALE,
    AttentionBlock,
    AttentionFunction,
    FeedForwardBlock,
    RMSNorm,
)

# The gradients of a half's tensors: the norm's weight, then each Linear's operands and LoRA.
Gradients = list[torch.Tensor | None]


class _Norm:
    """RMS norm whose weight includes the factor s of the next Linears."""

    def __init__(self, norm: RMSNorm, weight: torch.Tensor, scale: float) -> None:
        self._eps = norm.eps
        self._weight = weight.float() * scale

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        self._rstd = norm.square_().div_(h.shape[-1]).add_(self._eps).rsqrt_()  # (T, 1)
        return self.recompute(h)

    def recompute(self, h: torch.Tensor) -> torch.Tensor:
        """Recompute the output of `forward`, so that the caller need not keep it."""
        if h.dtype == torch.float32:
            return torch.mul(h, self._rstd, out=buffer_pool.empty(h, *h.shape)).mul_(self._weight)
        return buffer_pool.empty(h, *h.shape).copy_((h * self._rstd).mul_(self._weight))

    def backward(
        self,
        gx: torch.Tensor,
        h: torch.Tensor,
        g: torch.Tensor,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of h through x and the residual; overwrites gx [T, dim_model]."""
        wide = h.float()
        u = gx.mul_(self._weight) if gx.dtype == torch.float32 else gx.float() * self._weight
        product = torch.mul(u, wide, out=buffer_pool.empty(u, *h.shape))
        along = product.sum(-1, keepdim=True).mul_(self._rstd.pow(3)).div_(h.shape[-1])  # (T, 1)
        del product
        gh = u.mul_(self._rstd).addcmul_(wide, along, value=-1)  # (T, dim_model)
        if queries is None:
            return gh.add_(g, alpha=RESIDUAL_SCALE).to(h.dtype)
        return gh.to(h.dtype).index_add_(0, queries, g, alpha=RESIDUAL_SCALE)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu.out(x, out=buffer_pool.empty(x, *x.shape))


class _Begin(torch.autograd.Function):
    """Begins a graph at a tensor without keeping the tensor, unlike a leaf of a graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        raise AssertionError("the graph ends before this node")


class AttentionHalf:
    """`layers.AttentionBlock` of a frozen layer, for one forward and backward pass."""

    def __init__(
        self,
        block: AttentionBlock,
        weights: Sequence[FrozenLinear],
        norm: torch.Tensor,
        layer: int,
        attend: AttentionFunction,
        queries: torch.Tensor | None,
    ) -> None:
        self._layer, self._attend, self._queries = layer, attend, queries
        self._heads = block.self_attention.heads
        self._q, self._k, self._v, self._out = weights
        self._norm = _Norm(block.layernorm_before_attention, norm, self._q.linear.scale)
        self.is_trained = any(w.lora for w in weights)

    def forward(self, h: torch.Tensor, *, keep: bool, input_needed: bool) -> torch.Tensor:
        x = self._norm.forward(h)
        query_inputs = x if self._queries is None else x[self._queries]  # (N, dim_model)
        projected = (self._q.forward(query_inputs), self._k.forward(x), self._v.forward(x))
        del x, query_inputs
        q, k, v = (y.unflatten(-1, self._heads) for y in projected)  # (N or T, H, D)
        del projected
        if keep:
            attended = self._attend_with_graph(h, q, k, v, input_needed)
        else:
            attended = self._attend(self._layer, q, k, v)
        flat = attended.flatten(-2)  # (N, H, D) -> (N, H*D)
        return self._out.residual(h if self._queries is None else h[self._queries], flat)

    def _attend_with_graph(
        self, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_needed: bool
    ) -> torch.Tensor:
        """q [N, H, D], k and v [T, H, D] -> [N, H, D]; keeps the graph of the attention."""
        anchor = torch.zeros((), requires_grad=True)
        self._edges: list[GradientEdge | None] = []
        inputs = []
        with torch.enable_grad():
            for weight, y in ((self._q, q), (self._k, k), (self._v, v)):
                needed = input_needed or bool(weight.lora)
                inputs.append(_Begin.apply(y, anchor) if needed else y)
                self._edges.append(get_gradient_edge(inputs[-1]) if needed else None)
            attended = self._attend(self._layer, *inputs)
        self._h = h
        self._result = get_gradient_edge(attended) if attended.requires_grad else None
        attended = attended.detach()
        self._attended = attended.flatten(-2) if self._out.lora else h  # read only for LoRA
        return attended

    def backward(
        self, g: torch.Tensor, *, input_needed: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        h, scale = self._h, RESIDUAL_SCALE * self._out.linear.scale
        of_out = self._out.gradients(g, self._attended, scale)
        ga = self._out.input_gradient(g, scale).unflatten(-1, self._heads)  # (N, H, D)
        gq, gk, gv = self._attention_gradients(ga)
        del ga, self._attended, self._edges, self._result
        x = self._norm.recompute(h) if any(w.lora for w in (self._q, self._k, self._v)) else h
        query_inputs = x if self._queries is None else x[self._queries]
        gradients: Gradients = [None]
        for weight, gy, inputs in ((self._q, gq, query_inputs), (self._k, gk, x), (self._v, gv, x)):
            gradients += weight.gradients(gy, inputs)
        gradients += of_out
        del x, query_inputs
        if not input_needed:
            return None, gradients
        assert gq is not None and gk is not None and gv is not None
        gx = self._v.input_gradient(gv)
        self._k.add_input_gradient(gx, gk)
        if self._queries is None:
            self._q.add_input_gradient(gx, gq)
        else:
            gx.index_add_(0, self._queries, self._q.input_gradient(gq))
        return self._norm.backward(gx, h, g, self._queries), gradients

    def _attention_gradients(self, ga: torch.Tensor) -> Gradients:
        """The gradients of q [N, H*D], k and v [T, H*D]; None where not needed."""
        edges = [edge for edge in self._edges if edge is not None]
        if not edges:
            return [None] * 3
        assert self._result is not None
        found = iter(torch.autograd.grad([self._result], edges, [ga]))
        return [None if edge is None else next(found).flatten(1) for edge in self._edges]


class FeedForwardHalf:
    """`layers.FeedForwardBlock` of a frozen layer, for one forward and backward pass."""

    def __init__(
        self, block: FeedForwardBlock, weights: Sequence[FrozenLinear], norm: torch.Tensor
    ) -> None:
        self._w_0, self._w_1, self._out = weights
        self._norm = _Norm(block.layernorm_before_ffn, norm, self._w_0.linear.scale)
        self.is_trained = any(w.lora for w in weights)

    def forward(self, h: torch.Tensor, *, keep: bool, input_needed: bool) -> torch.Tensor:
        x = self._norm.forward(h)
        inner, gate = self._w_0.forward(x), self._w_1.forward(x)  # (T, dim_ff)
        del x
        if keep:
            self._h, self._inner, self._gate = h, inner, gate
        return self._out.residual(h, _gelu(inner).mul_(gate))

    def backward(
        self, g: torch.Tensor, *, input_needed: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        h, inner, gate = self._h, self._inner, self._gate
        del self._inner, self._gate
        scale = RESIDUAL_SCALE * self._out.linear.scale
        activated = _gelu(inner)
        product = activated * gate if self._out.lora else activated
        of_out = self._out.gradients(g, product, scale)
        del product
        g_product = self._out.input_gradient(g, scale)  # (T, dim_ff)
        g_gate = activated.mul_(g_product)
        g_inner = torch.ops.aten.gelu_backward.grad_input(
            g_product.mul_(gate), inner, grad_input=g_product
        )
        del g_product, activated, inner, gate
        x = self._norm.recompute(h) if self._w_0.lora or self._w_1.lora else h
        gradients: Gradients = [None, *self._w_0.gradients(g_inner, x)]
        gradients += [*self._w_1.gradients(g_gate, x), *of_out]
        del x
        if not input_needed:
            return None, gradients
        gx = self._w_0.input_gradient(g_inner)
        self._w_1.add_input_gradient(gx, g_gate)
        del g_inner, g_gate
        return self._norm.backward(gx, h, g), gradients
