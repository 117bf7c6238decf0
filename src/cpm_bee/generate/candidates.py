"""The most probable next tokens, from logits of any number of rows at once.

Ties are decided by number, the lower one first, so that an answer does not depend on which records
share a batch, nor on how a kernel breaks ties. `torch.topk` promises no order of equal values, so
it is given keys that are never equal: the value's bits in the upper half of an int64, in an
order-preserving form, and the position, counted down, in the lower half.

To do that with all logits would take longer than the product that computes them. So each row is
divided into groups. The k best values of a row are in the k groups that come first when ordered by
their maximum and then by position: for a value in any other group, each of these k groups has a
value that comes before it. Only the values of these groups are sorted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

GROUP = 64  # the number of logits per group
# The logsumexp of as many rows at once as stay in the cache.
_ROWS_IN_CACHE = 4


class Best(NamedTuple):
    """The best candidates of each row, best first."""

    log_p: torch.Tensor  # (N, k) fp32; -inf for what is no candidate, NaN if logits are not finite
    numbers: torch.Tensor  # (N, k) int64


def best_of_rows(logits: torch.Tensor, k: int) -> Best:
    """The k best candidates of each row and their log probability.

    Args:
        logits: fp32 [N, C], -inf for what is no candidate; C is a multiple of `GROUP`, at least k.
    """
    groups = logits.unflatten(1, (-1, GROUP))
    maxima = groups.amax(dim=2)  # (N, C / GROUP)
    first = best_positions(maxima, min(k, maxima.shape[1])).sort(dim=1).values  # (N, g)
    values = groups.gather(1, first[:, :, None].expand(-1, -1, GROUP)).flatten(1)  # (N, g * GROUP)
    positions = best_positions(values, k)  # (N, k)
    numbers = first.gather(1, positions // GROUP) * GROUP + positions % GROUP
    total = torch.cat([rows.logsumexp(dim=1) for rows in logits.split(_ROWS_IN_CACHE)])
    return Best(values.gather(1, positions) - total[:, None], numbers)


def best_positions(values: torch.Tensor, k: int) -> torch.Tensor:
    """The positions of the k largest values of each row of fp32 [N, C]; of equals the first one."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: no -0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of values
    count_down = torch.arange(values.shape[1], 0, -1, device=values.device)
    return ((ordered.long() << 32) + count_down).topk(k, dim=1).indices


def best_of_beams(rows: Best, log_p: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best continuations of each record among those of its beams.

    Args:
        rows: the candidates of R * B rows, of which there are at least k each.
        log_p: of the beams so far, fp32 [R, B].

    Returns:
        Their summed log probabilities, [R, k], with inf for NaN, and their positions among the
        B * k candidates of the record's beams, which are in the order of (beam, rank).
    """
    total = rows.log_p.unflatten(0, log_p.shape) + log_p[:, :, None]  # (R, B, k)
    # NaN comes first, so that it is found.
    total = total.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    positions = best_positions(total.flatten(1), k)
    return total.flatten(1).gather(1, positions), positions


def best_continuations(
    logits: torch.Tensor, log_p: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best continuations of R records with B beams each.

    Args:
        logits: fp32 [R * B, C].
        log_p: of the beams so far, fp32 [R, B].

    Returns:
        Summed log probabilities, parents (beams) and numbers of the candidates, each [R, k].
    """
    best = best_of_rows(logits, k)
    total, positions = best_of_beams(best, log_p, k)
    numbers = best.numbers.unflatten(0, log_p.shape).flatten(1).gather(1, positions)
    return total, positions // k, numbers
