"""Drawing the next token from the model's distribution instead of taking the best ones.

The order of the filters is that of Hugging Face's generation: temperature, `top_k`, `top_p`
(nucleus sampling; Holtzman et al. 2020), `min_p` (Nguyen et al. 2024). A token is drawn by a
uniform number u from the record's own generator: it is the first one at which the cumulative
probability exceeds u. So what is drawn for a record depends on its seed and number, not on the
records that share its batch. Hazard: probabilities are rounded differently in batches of other
shapes, so if u is within that rounding of a boundary (one in about 10^5 tokens), the neighbour is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cpm_bee.generate.options import GenerationOptions

_ROWS = 8  # are drawn at once: cumulative sums in fp64 take 0.7 MiB a row
_FIRST = 1024  # candidates that almost always hold `top_p` of the probability


def sample(
    logits: torch.Tensor, options: Sequence[GenerationOptions], uniforms: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw m tokens for each row.

    Args:
        logits: fp32 [N, C], -inf for what is no candidate.
        options: of each row.
        uniforms: numbers from 0 to 1 (exclusive), fp64 [N, m].

    Returns:
        The log probability of each token by the model itself, without temperature and filters,
        fp32 [N, m], and its number, int64 [N, m].
    """
    found = []
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        u = torch.from_numpy(uniforms[part]).to(logits.device)
        found.append(_sample(logits[part], options[part], u))
    return torch.cat([log_p for log_p, _ in found]), torch.cat([number for _, number in found])


def _sample(
    logits: torch.Tensor, options: Sequence[GenerationOptions], u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits / column([o.temperature or 1.0 for o in options])
    if any(o.top_k for o in options):
        limits = [min(o.top_k or logits.shape[1], logits.shape[1]) for o in options]
        values = scaled.topk(max(limits), dim=1).values
        last = torch.tensor(limits, device=logits.device)[:, None] - 1
        scaled = _above(scaled, values.gather(1, last))
    if any(o.top_p is not None for o in options):
        scaled = _above(scaled, _nucleus(scaled, column([o.top_p or 1.0 for o in options])))
    if any(o.min_p is not None for o in options):
        shares = column([math.log(o.min_p) if o.min_p else -math.inf for o in options])
        scaled = _above(scaled, scaled.amax(dim=1, keepdim=True) + shares)
    cumulative = scaled.double().softmax(dim=1).cumsum(dim=1)
    # The rounding of the sum may leave less than 1.
    targets = u * cumulative[:, -1:]
    numbers = torch.searchsorted(cumulative, targets, right=True).clamp(max=logits.shape[1] - 1)
    return logits.log_softmax(dim=1).gather(1, numbers), numbers


def _above(scaled: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    return scaled.masked_fill(scaled < least, -math.inf)


def _nucleus(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit of the least set of tokens that has `top_p` of the probability, [N, 1]."""
    total = scaled.logsumexp(dim=1, keepdim=True)
    for count in (min(_FIRST, scaled.shape[1]), scaled.shape[1]):
        values = scaled.topk(count, dim=1).values
        cumulative = (values - total).double().exp().cumsum(dim=1)
        if bool((cumulative[:, -1:] >= top_p).all()):
            break
    # A token is kept if those before it have less than `top_p`.
    kept = ((cumulative < top_p).sum(dim=1, keepdim=True)).clamp(max=count - 1)
    return values.gather(1, kept)
