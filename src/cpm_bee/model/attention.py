"""Who sees whom, with which bias; and attention over the flat stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.encoding import MAX_DEPTH
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig

# Records of one attention call are padded to the longest; a group takes records down to this
# share of it. Padding costs only in attention, a small part of the work.
_GROUP_SHARE = 0.8


class PositionBias(nn.Module):
    """The bias table of all layers and its row for each (query, key) pair (SPEC §5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_buckets = config.position_bias_num_buckets
        self.max_distance = config.position_bias_max_distance
        self.num_segment_buckets = config.position_bias_num_segment_buckets
        self.num_rows = self.num_buckets + self.num_segment_buckets
        self.relative_attention_bias = nn.Parameter(torch.empty(self.num_rows, config.num_heads))

    def position_rows(self, relative: torch.Tensor) -> torch.Tensor:
        """The row of a relative position k - q within one segment; any shape, int64."""
        half = self.num_buckets // 2
        exact = half // 2
        distance = relative.abs()
        # In fp32, as the reference: near a bucket's border the rounding decides.
        far = torch.log(distance.clamp(min=1).float() / exact)
        far = far / math.log(self.max_distance / exact) * (half - exact)
        far = torch.clamp(exact + far.to(torch.int64), max=half - 1)
        return (relative > 0).long() * half + torch.where(distance < exact, distance, far)

    def rows(self, position: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Rows from positions k - q and segment relations of the same shape.

        Raises:
            InputError: a relation that the table has no row for (only a table of fewer segment
                buckets than there are relations can lack one).
        """
        if self.num_segment_buckets < MAX_DEPTH * MAX_DEPTH and relation.numel():
            largest = int(relation.max())
            if largest > self.num_segment_buckets:
                raise InputError(
                    f"a record needs segment bucket {largest} of the position bias, this model "
                    f"has {self.num_segment_buckets}: its fields are nested too deeply"
                )
        same = relation == 0
        return torch.where(same, self.position_rows(position), self.num_buckets - 1 + relation)

    @property
    def hidden_row(self) -> int:
        """The row that stands for "not visible": one past the table, see `values`."""
        return self.num_rows

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """The additive mask of rows [G, Q, K] -> [G, heads, Q, K]; -inf where not visible."""
        table = self.relative_attention_bias
        hidden = table.new_full((1, table.shape[1]), float("-inf"))
        return F.embedding(rows, torch.cat([table, hidden])).permute(0, 3, 1, 2)


class Group(NamedTuple):
    """G records of similar length, padded to L tokens."""

    places: torch.Tensor  # (G, L) position in the stream; any valid one for padding
    rows: torch.Tensor  # (G, L, L) rows of the bias table


@dataclass(frozen=True)
class Layout:
    """How the stream's records are grouped for attention. Depends on the batch alone."""

    groups: tuple[Group, ...]
    inverse: torch.Tensor  # (T,) position of each token among the groups' outputs laid end to end

    @classmethod
    def of(cls, batch: Batch, bias: PositionBias) -> Layout:
        device = batch.ids.device
        starts = _starts(batch.lengths)
        relation_starts = _starts([s * s for s in batch.num_segments])
        order = sorted(range(len(batch.lengths)), key=lambda r: -batch.lengths[r])
        groups: list[Group] = []
        inverse = torch.empty(batch.num_tokens, dtype=torch.int64, device=device)
        padded = 0
        while order:
            longest = batch.lengths[order[0]]
            size = sum(batch.lengths[r] >= _GROUP_SHARE * longest for r in order)
            members, order = order[:size], order[size:]
            select = [[v[r] for r in members] for v in (starts, batch.lengths, batch.num_segments)]
            start, length, segments = (torch.tensor(v, device=device)[:, None] for v in select)
            relation_start = torch.tensor([relation_starts[r] for r in members], device=device)
            offset = torch.arange(longest, device=device)  # (L,)
            valid = offset < length  # (G, L)
            index = start + torch.minimum(offset, length - 1)
            rows = _rows(batch, bias, index, valid, relation_start, segments[:, 0])
            slots = padded + torch.arange(index.numel(), device=device).view_as(index)
            inverse[index[valid]] = slots[valid]
            padded += index.numel()
            groups.append(Group(index, rows))
        return cls(tuple(groups), inverse)


def _starts(lengths: list[int] | tuple[int, ...]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _rows(
    batch: Batch,
    bias: PositionBias,
    index: torch.Tensor,
    valid: torch.Tensor,
    relation_start: torch.Tensor,
    num_segments: torch.Tensor,
) -> torch.Tensor:
    """Bias rows of a group, [G, L, L]."""
    segment = batch.segments[index]  # (G, L)
    place = relation_start[:, None, None] + (
        segment[:, :, None] * num_segments[:, None, None] + segment[:, None, :]
    )
    relation = batch.relations[place].long()  # (G, L, L)
    position = torch.arange(index.shape[1], device=index.device)
    relative = position[None, :] - position[:, None]  # (L, L), k - q
    rows = bias.rows(relative.expand_as(relation), relation)
    context = batch.context[index]
    visible = context[:, None, :] | (~context[:, :, None] & (relative <= 0))
    # Padding queries see everything, so that no row is empty (an empty softmax is NaN).
    visible = (visible & valid[:, None, :]) | ~valid[:, :, None]
    return torch.where(visible, rows, bias.hidden_row)


class GroupedAttention:
    """Attention of each record with itself, for all layers of one forward pass."""

    def __init__(
        self, layout: Layout, bias: PositionBias, dtype: torch.dtype, dropout_p: float
    ) -> None:
        self._layout = layout
        self._biases = [bias.values(g.rows).to(dtype) for g in layout.groups]  # (G, H, L, L)
        self._dropout_p = dropout_p

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q, k, v [T, H, D] -> [T, H, D]."""
        outputs = []
        for group, bias in zip(self._layout.groups, self._biases, strict=True):
            gq, gk, gv = (x[group.places].transpose(1, 2) for x in (q, k, v))  # (G, H, L, D)
            o = F.scaled_dot_product_attention(gq, gk, gv, bias, self._dropout_p)
            outputs.append(o.transpose(1, 2).flatten(0, 1))  # (G*L, H, D)
        return torch.cat(outputs)[self._layout.inverse]
