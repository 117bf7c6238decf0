"""Blocks with a backward pass of their own, for a frozen base with LoRA.

Frozen weights need no gradient, so the inputs of their products need not be kept: an attention
keeps its input, q, k, v and its output, a loader-forward its input and the two halves of the gate.
Everything else is computed again, in place where possible; the factors 1/sqrt(dim_in) and 1/1.05
are folded into norms and sums. The results are those of `layers`, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from cpm_bee.model.frozen.halves import AttentionPass, FeedForwardPass, Gradients
from cpm_bee.model.frozen.linear import FrozenLinear
from cpm_bee.model.layers import Attend, AttentionBlock, FeedForwardBlock, Linear, RMSNorm


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing but LoRA is trained in a module, without dropout."""
    for child in module.modules():
        if isinstance(child, nn.Dropout) and child.p > 0 and child.training:
            return False
        if isinstance(child, (Linear, RMSNorm)) and any(
            p.requires_grad for p in child.parameters(recurse=False)
        ):
            return False
    return True


class _Call(NamedTuple):
    """The halves that a block has, and what they are called with."""

    attention: AttentionBlock | None
    feed_forward: FeedForwardBlock | None
    layer: int
    attend: Attend
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
        """For each half the norm's weight, then each Linear's operands and LoRA."""
        found: list[torch.Tensor] = []
        for norm, linears in self.parts():
            found.append(norm.weight)
            for linear in linears:
                found += [*linear.operands(), *FrozenLinear.lora_of(linear)]
        return found

    def passes(self, tensors: Sequence[torch.Tensor]) -> list[AttentionPass | FeedForwardPass]:
        """Passes over tensors that lie as `tensors` lays them."""
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
        passes: list[AttentionPass | FeedForwardPass] = []
        if self.attention is not None:
            passes.append(
                AttentionPass(self.attention, *taken[0], self.layer, self.attend, self.queries)
            )
        if self.feed_forward is not None:
            passes.append(FeedForwardPass(self.feed_forward, *taken[-1]))
        return passes


class _FrozenBlock(torch.autograd.Function):
    """Inputs: the call, whether to compute activations again, h [T, dim_model], the tensors.

    What backward needs is kept by the passes themselves, not by `save_for_backward`: part of it
    is the graph of the attention.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, recompute: bool, h: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.call, ctx.recompute, ctx.kept = call, recompute, (h, tensors)
        ctx.passes = call.passes(tensors)
        ctx.below = _needed_below(ctx.passes, ctx.needs_input_grad[2])
        h = _forward(ctx.passes, h, ctx.below, keep=not recompute)
        if recompute:
            ctx.passes = None
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        h, tensors = ctx.kept
        if ctx.recompute:
            ctx.passes = ctx.call.passes(tensors)
            _forward(ctx.passes, h, ctx.below, keep=True)
        del h
        ctx.kept = None
        g: torch.Tensor | None = gradients[0]
        found: Gradients = []
        while ctx.passes and g is not None:
            # Popped, so that what a pass kept is freed before the one below it begins.
            g, mine = ctx.passes.pop().backward(g, input_needed=ctx.below.pop())
            found = mine + found
        return None, None, g, *[None] * (len(tensors) - len(found)), *found


def _needed_below(passes: Sequence[AttentionPass | FeedForwardPass], needed: bool) -> list[bool]:
    """Whether the gradient of each pass's input is needed."""
    result = []
    for run in passes:
        result.append(needed)
        needed = needed or run.is_trained
    return result


def _forward(
    passes: Sequence[AttentionPass | FeedForwardPass],
    h: torch.Tensor,
    below: Sequence[bool],
    *,
    keep: bool,
) -> torch.Tensor:
    with torch.autocast(h.device.type, enabled=False):
        for run, needed in zip(passes, below, strict=True):
            h = run.forward(h, keep=keep and (needed or run.is_trained), input_needed=needed)
    return h


def block(
    attention: AttentionBlock | None,
    feed_forward: FeedForwardBlock | None,
    layer: int,
    h: torch.Tensor,
    attend: Attend,
    queries: torch.Tensor | None,
    *,
    recompute: bool,
) -> torch.Tensor:
    """h [T, dim_model] -> the same, or [N, dim_model] of `queries`, through a frozen block.

    Args:
        recompute: keep h alone and compute the rest again in the backward pass.
    """
    call = _Call(attention, feed_forward, layer, attend, queries)
    return _FrozenBlock.apply(call, recompute, h, *call.tensors())
