"""A layer whose weights are frozen, except for LoRA, as one autograd function.

Autograd saves the input of every Linear, because the gradient of the weight needs it. A frozen
weight has no gradient, and the gradient of its input, g W, needs only W. So `_FrozenBlock` runs
a layer without a graph and keeps for the backward pass:

- for the attention block, its input h, the norm's 1/rms, and the graph of the attention function
  (q, k, v and what the kernel saves); its output only if `attention_out` has LoRA;
- for the feed-forward block, its input h, the norm's 1/rms, and the two products of the gate;
- with `recompute` (activation checkpointing), only h, from which the rest is recomputed.

Everything else is recomputed, in place where possible: normed inputs from h and 1/rms, GELU from
its input. 1/sqrt(dim_in) is folded into the norm's weight, 1/1.05 into the residual sums. These are
the operations of `model/layers.py` in a different order, so gradients equal those of autograd up to
rounding; tests/model/frozen compares them. `model/frozen/halves.py` explains the mathematics of
both halves, `model/frozen/linear.py` that of a Linear.

Hazards: gradients of norm and base weights are returned as None, so `is_frozen` must hold; there
is no dropout; the kept tensors are attributes of the halves and of `ctx`, not saved with
`save_for_backward`, so in-place changes of h or of a weight between forward and backward are not
detected, and a second backward pass fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from cpm_bee.model.frozen.halves import AttentionHalf, FeedForwardHalf, Gradients
from cpm_bee.model.frozen.linear import FrozenLinear
from cpm_bee.model.layers import (
    AttentionBlock,
    AttentionFunction,
    FeedForwardBlock,
    Linear,
    RMSNorm,
)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module trains nothing but LoRA and has no active dropout."""
    for child in module.modules():
        if isinstance(child, nn.Dropout) and child.p > 0 and child.training:
            return False
        if isinstance(child, (Linear, RMSNorm)) and any(
            p.requires_grad for p in child.parameters(recurse=False)
        ):
            return False
    return True


class _Call(NamedTuple):
    """The blocks of a layer and the arguments of its forward pass."""

    attention: AttentionBlock | None
    feed_forward: FeedForwardBlock | None
    layer: int
    attend: AttentionFunction
    queries: torch.Tensor | None

    def parts(self) -> list[tuple[RMSNorm, tuple[Linear, ...]]]:
        """The norm and the Linears of each half."""
        found: list[tuple[RMSNorm, tuple[Linear, ...]]] = []
        if self.attention is not None:
            a = self.attention.self_attention
            linears = (a.project_q, a.project_k, a.project_v, a.attention_out)
            found.append((self.attention.layernorm_before_attention, linears))
        if self.feed_forward is not None:
            f = self.feed_forward.ffn
            found.append(
                (self.feed_forward.layernorm_before_ffn, (f.w_in.w_0, f.w_in.w_1, f.w_out))
            )
        return found

    def tensors(self) -> list[torch.Tensor]:
        """For each half, the norm's weight, then the operands and LoRA of each Linear."""
        found: list[torch.Tensor] = []
        for norm, linears in self.parts():
            found.append(norm.weight)
            for linear in linears:
                found += [*linear.operands(), *FrozenLinear.lora_of(linear)]
        return found

    def halves(self, tensors: Sequence[torch.Tensor]) -> list[AttentionHalf | FeedForwardHalf]:
        """Makes the halves from tensors in the order of `tensors`, for one forward and backward."""
        rest = iter(tensors)
        taken = []
        for _, linears in self.parts():
            norm = next(rest)
            weights = [
                FrozenLinear(
                    linear,
                    tuple(islice(rest, len(linear.operands()))),
                    tuple(islice(rest, len(FrozenLinear.lora_of(linear)))),
                )
                for linear in linears
            ]
            taken.append((weights, norm))
        halves: list[AttentionHalf | FeedForwardHalf] = []
        if self.attention is not None:
            halves.append(
                AttentionHalf(self.attention, *taken[0], self.layer, self.attend, self.queries)
            )
        if self.feed_forward is not None:
            halves.append(FeedForwardHalf(self.feed_forward, *taken[-1]))
        return halves


class _FrozenBlock(torch.autograd.Function):
    """Inputs: the call, whether to recompute, h [T, dim_model], and the tensors of the call.

    The tensors are inputs because autograd passes gradients only to inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, recompute: bool, h: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.call, ctx.recompute, ctx.kept = call, recompute, (h, tensors)
        ctx.halves = call.halves(tensors)
        ctx.input_needed = _input_gradients_needed(ctx.halves, ctx.needs_input_grad[2])
        h = _forward(ctx.halves, h, ctx.input_needed, keep=not recompute)
        if recompute:
            ctx.halves = None
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        h, tensors = ctx.kept
        if ctx.recompute:
            ctx.halves = ctx.call.halves(tensors)
            _forward(ctx.halves, h, ctx.input_needed, keep=True)
        del h
        ctx.kept = None
        g: torch.Tensor | None = gradients[0]
        found: Gradients = []
        while ctx.halves and g is not None:
            # Popped, so that a half's kept tensors are freed before the one below it begins.
            half, input_needed = ctx.halves.pop(), ctx.input_needed.pop()
            g, of_half = half.backward(g, input_needed=input_needed)
            del half
            found = of_half + found
        return None, None, g, *[None] * (len(tensors) - len(found)), *found


def _input_gradients_needed(
    halves: Sequence[AttentionHalf | FeedForwardHalf], needed: bool
) -> list[bool]:
    """Whether each half's input needs a gradient, because something below it is trained."""
    result = []
    for half in halves:
        result.append(needed)
        needed = needed or half.is_trained
    return result


def _forward(
    halves: Sequence[AttentionHalf | FeedForwardHalf],
    h: torch.Tensor,
    input_needed: Sequence[bool],
    *,
    keep: bool,
) -> torch.Tensor:
    with torch.autocast(h.device.type, enabled=False):
        for half, needed in zip(halves, input_needed, strict=True):
            h = half.forward(h, keep=keep and (needed or half.is_trained), input_needed=needed)
    return h


def frozen_block(
    attention: AttentionBlock | None,
    feed_forward: FeedForwardBlock | None,
    layer: int,
    h: torch.Tensor,
    attend: AttentionFunction,
    queries: torch.Tensor | None,
    *,
    recompute: bool,
) -> torch.Tensor:
    """Run a frozen layer: h [T, dim_model] -> [T, dim_model], or [N, dim_model] at `queries`.

    Args:
        recompute: keep only h, and recompute the rest in the backward pass.
    """
    call = _Call(attention, feed_forward, layer, attend, queries)
    return _FrozenBlock.apply(call, recompute, h, *call.tensors())
