"""Cross entropy at the targets with its gradient, with only a piece of the logits in memory.

The logits of N targets over a vocabulary V of 86,583 tokens would be the largest tensor of a step,
and autograd would keep their softmax for the backward pass. If the output head is frozen, only the
gradient of the states h is needed, and it is known as soon as the logits are: for logits h Eᵀ and
probabilities p it is p E - E[target]. So `TargetLoss` computes loss and gradient in its forward
pass, piece by piece, keeps only the gradient [N, dim_model], and multiplies it by the incoming
gradient in its backward pass. No logits are kept.

`_Piece` stores the logits transposed, [V, n], because E hᵀ is the faster product on a CPU, and
overwrites them with exp(logit - max). The logits of the extension entries are a second matrix,
[E, n], with the same maximum and sum. The division by that sum follows the product with E, because
it is then a division of n rows only.

The result equals that of autograd and `cross_entropy` up to rounding. Hazards: `losses` overwrites
the logits, so `best` must be called before it and `gradient` after it; a trainable embedding
needs autograd (`CPMBee.loss` chooses); the gradient is kept in fp32, because fp16 would underflow
before the multiplication by the loss scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cpm_bee.model.frozen.buffers import buffer_pool

# The number of targets per piece; with 86,583 tokens, the fp32 logits of a target take 0.33 MiB.
_PIECE = 256
# On a CPU the product of [V, D] and [D, N] is up to 1.5 times as fast if N is a multiple of this.
_MULTIPLE = 16


class Scores(NamedTuple):
    """The losses of N targets, and what is predicted in their places."""

    losses: torch.Tensor  # (N,) fp32, cross entropy
    correct: torch.Tensor  # (N,) bool, the target is the argmax
    best: torch.Tensor  # (N,) int64, the argmax, numbered as targets; the first of equal logits


class Candidates(NamedTuple):
    """What generation could write at each of N targets, besides the ordinary vocabulary."""

    unk: int  # id of <unk>
    has_unk: torch.Tensor  # (N,) bool
    extension: torch.Tensor  # (N, E) bool


class OutputHead(NamedTuple):
    """Maps states to logits of V vocabulary and E extension entries (docs/format.md §5)."""

    weight: torch.Tensor  # (V, dim_model)
    scale: float  # of the products with `weight`
    table: torch.Tensor  # (E, dim_model)


class _Piece:
    """The logits [V + E, n] of n targets, their losses and gradient."""

    def __init__(self, h: torch.Tensor, head: OutputHead, targets: torch.Tensor) -> None:
        weight, scale, table = head
        padded = F.pad(h, (0, 0, 0, -len(h) % _MULTIPLE))  # (n, D), n padded to a multiple
        logits = buffer_pool.empty(weight, len(weight), len(padded))
        torch.mm(weight, (padded * scale).mT, out=logits)
        self._vocabulary = logits.float()  # (V, n)
        self._extension = (table @ padded.mT).float()  # (E, n)
        self._head, self._targets = head, targets

    def best(self, candidates: Candidates | None) -> torch.Tensor:
        """The argmax of the logits of each target, int64 [n]; call before `losses`.

        With `candidates`, only the logits that generation would choose from count.
        """
        extension = self._extension[:, : len(self._targets)]  # (E, n), padding left out
        vocabulary = self._vocabulary[:, : len(self._targets)]  # (V, n)
        if candidates is not None:
            extension = extension.masked_fill(~candidates.extension.mT, float("-inf"))
            unk = vocabulary[candidates.unk].clone()
            vocabulary[candidates.unk].masked_fill_(~candidates.has_unk, float("-inf"))
        best = vocabulary.argmax(dim=0)
        if len(extension):
            # In 16 bit several logits may be equal: the first one counts, as in one row of logits.
            higher = extension.amax(dim=0) > vocabulary.amax(dim=0)
            other = extension.argmax(dim=0) + len(vocabulary)
            best = torch.where(higher, other, best)
        if candidates is not None:
            vocabulary[candidates.unk] = unk
        return best

    def losses(self, own: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of each target, fp32 [n]; overwrites each logit with exp(logit - max).

        With `own`, bool [n, E], only these extension entries count.
        """
        if own is not None and own.numel():
            self._extension[:, : len(own)].masked_fill_(~own.mT, float("-inf"))
        parts = [part for part in (self._vocabulary, self._extension) if len(part)]
        top = torch.stack([part.amax(dim=0) for part in parts]).amax(dim=0)  # (n,)
        chosen = self._at_targets(self._vocabulary, self._extension)
        self._total = torch.zeros_like(top)
        for part in parts:
            self._total += part.sub_(top).exp_().sum(dim=0)
        return (self._total.log() + top)[: len(chosen)] - chosen

    def _at_targets(self, vocabulary: torch.Tensor, extension: torch.Tensor) -> torch.Tensor:
        column = torch.arange(len(self._targets), device=vocabulary.device)
        last = len(vocabulary) - 1
        chosen = vocabulary[self._targets.clamp(max=last), column]
        if not len(extension):
            return chosen
        return torch.where(
            self._targets <= last, chosen, extension[(self._targets - last - 1).clamp(0), column]
        )

    def gradient(self) -> torch.Tensor:
        """The gradient of the summed losses w.r.t. h, [n, dim_model]; call after `losses`."""
        weight, scale, table = self._head
        expected = (self._vocabulary.mT.to(weight.dtype) @ weight) * scale  # (n, D)
        last = len(weight) - 1
        target = weight[self._targets.clamp(max=last)] * scale  # (n, D)
        if len(table):
            expected += self._extension.mT.to(table.dtype) @ table
            own = table[(self._targets - last - 1).clamp(0)]
            target = torch.where((self._targets <= last)[:, None], target, own)
        return (expected / self._total[:, None])[: len(target)] - target


class TargetLoss(torch.autograd.Function):
    """The summed cross entropy of states [N, dim_model] with a frozen output head."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, head: OutputHead, targets: torch.Tensor) -> torch.Tensor:
        total = h.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(h, dtype=torch.float32)  # fp16 may need the loss scale first
        for i in range(0, len(h), _PIECE):
            part = slice(i, i + _PIECE)
            piece = _Piece(h[part], head, targets[part])
            total += piece.losses().sum()
            if ctx.needs_input_grad[0]:
                gradient[part] = piece.gradient()
            del piece  # frees its memory for the next one
        ctx.save_for_backward(gradient)
        ctx.dtype = h.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * g[0]).to(ctx.dtype), None, None


@torch.no_grad()
def score(
    h: torch.Tensor,
    head: OutputHead,
    targets: torch.Tensor,
    candidates: Candidates | None = None,
    own_extension: torch.Tensor | None = None,
) -> Scores:
    """The scores of states [N, dim_model].

    Args:
        candidates: see `_Piece.best`.
        own_extension: see `_Piece.losses`; bool [N, E].
    """
    scores = []
    for i in range(0, len(h), _PIECE):
        part = slice(i, i + _PIECE)
        piece = _Piece(h[part], head, targets[part])
        own = candidates and candidates._replace(
            has_unk=candidates.has_unk[part], extension=candidates.extension[part]
        )
        best = piece.best(own)
        own_part = None if own_extension is None else own_extension[part]
        scores.append(Scores(piece.losses(own_part), best == targets[part], best))
        del piece
    return Scores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))
