"""Who sees whom, with which bias; and attention over the flat stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.encoding import NUM_DEPTHS
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.buffers import buffers

# Records of one attention call are padded to the longest; a group takes records down to this
# share of it. Padding costs only in attention, a small part of the work.
_GROUP_SHARE = 0.8


class PositionBias(nn.Module):
    """The bias table of all layers and its row for each (query, key) pair (docs/format.md §5)."""

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

    def check(self, relation: torch.Tensor) -> None:
        """Raises `InputError` for a segment relation that the table has no row for.

        Only a table of fewer segment buckets than there are relations can lack one.
        """
        if self.num_segment_buckets < NUM_DEPTHS * NUM_DEPTHS and relation.numel():
            largest = int(relation.max())
            if largest > self.num_segment_buckets:
                raise InputError(
                    f"a record needs segment bucket {largest} of the position bias, this model "
                    f"has {self.num_segment_buckets}: its fields are nested too deeply"
                )

    def rows(self, position: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Rows from positions k - q and segment relations of the same shape.

        Raises:
            InputError: as `check`.
        """
        self.check(relation)
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
    """G records of similar length: Q queries each that look at L keys, both padded."""

    rows: torch.Tensor  # (G, Q, L) rows of the bias table


class _Ragged(NamedTuple):
    """Consecutive items of each of G records, padded to the most that any of them has."""

    items: torch.Tensor  # (G, W) the last one again for padding
    valid: torch.Tensor  # (G, W) bool

    @classmethod
    def of(cls, starts: list[int], counts: list[int], device: torch.device) -> _Ragged:
        start, count = (torch.tensor(v, device=device)[:, None] for v in (starts, counts))
        offset = torch.arange(max(counts), device=device)  # (W,)
        return cls(start + torch.minimum(offset, count - 1), offset < count)


class Slots(NamedTuple):
    """Items of the stream laid out in padded groups, end to end: P slots for N items.

    Each item has one slot of its own; padding repeats some item.
    """

    items: torch.Tensor  # (P,) the item in each slot
    own: torch.Tensor  # (N,) the slot of each item
    padding: torch.Tensor  # (P - N,) the other slots
    sizes: list[int]  # slots of each group

    @classmethod
    def of(cls, parts: list[_Ragged]) -> Slots:
        items = torch.cat([part.items.flatten() for part in parts])
        valid = torch.cat([part.valid.flatten() for part in parts])
        own = torch.empty_like(items[: int(valid.sum())])
        own[items[valid]] = torch.nonzero(valid).squeeze(1)
        sizes = [part.items.numel() for part in parts]
        return cls(items, own, torch.nonzero(~valid).squeeze(1), sizes)


def _select(x: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return torch.index_select(x, 0, items, out=buffers.empty(x, len(items), *x.shape[1:]))


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = sum(len(part) for part in parts)
    return torch.cat(list(parts), out=buffers.empty(parts[0], rows, *parts[0].shape[1:]))


class _ToGroups(torch.autograd.Function):
    """x [N, ...] -> the slots of each group. Gradients of padding are not looked at."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: Slots) -> tuple[torch.Tensor, ...]:
        ctx.slots = slots
        return _select(x, slots.items).split(slots.sizes)

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        return _select(_join(g), ctx.slots.own), None


class _FromGroups(torch.autograd.Function):
    """The slots of each group -> [N, ...] without the padding."""

    @staticmethod
    def forward(ctx: Any, slots: Slots, *parts: torch.Tensor) -> torch.Tensor:
        ctx.slots = slots
        return _select(_join(parts), slots.own)

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        grouped = _select(g[0], ctx.slots.items).index_fill_(0, ctx.slots.padding, 0)
        return None, *grouped.split(ctx.slots.sizes)


@dataclass(frozen=True)
class GroupLayout:
    """How the stream's records are grouped for attention. Depends on the batch alone."""

    groups: tuple[Group, ...]
    queries: Slots
    keys: Slots

    @classmethod
    def of(cls, batch: Batch, bias: PositionBias, *, at_targets: bool = False) -> GroupLayout:
        """The layout with every token as a query, or only the positions that have a target."""
        device = batch.ids.device
        starts = _starts(batch.lengths)
        counts = list(batch.lengths)
        positions = torch.arange(batch.num_tokens, device=device)
        if at_targets:
            counts = torch.bincount(batch.target_records, minlength=len(batch.lengths)).tolist()
            positions = batch.target_positions
        query_starts = _starts(counts)
        relation_starts = _starts([s * s for s in batch.num_segments])
        order = [r for r in range(len(batch.lengths)) if counts[r]]
        order.sort(key=lambda r: -batch.lengths[r])
        groups: list[Group] = []
        group_queries: list[_Ragged] = []
        group_keys: list[_Ragged] = []
        while order:
            longest = batch.lengths[order[0]]
            size = sum(batch.lengths[r] >= _GROUP_SHARE * longest for r in order)
            members, order = order[:size], order[size:]
            queries = _Ragged.of(
                [query_starts[r] for r in members], [counts[r] for r in members], device
            )
            keys = _Ragged.of(
                [starts[r] for r in members], [batch.lengths[r] for r in members], device
            )
            relations = torch.tensor(
                [(relation_starts[r], batch.num_segments[r]) for r in members], device=device
            )
            rows = _rows(batch, bias, positions[queries.items], queries.valid, keys, relations)
            groups.append(Group(rows))
            group_queries.append(queries)
            group_keys.append(keys)
        return cls(tuple(groups), Slots.of(group_queries), Slots.of(group_keys))


def _starts(lengths: list[int] | tuple[int, ...]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _rows(
    batch: Batch,
    bias: PositionBias,
    queries: torch.Tensor,
    query_valid: torch.Tensor,
    keys: _Ragged,
    relations: torch.Tensor,
) -> torch.Tensor:
    """Bias rows [G, Q, L] of queries at positions of the stream, [G, Q]."""
    start, num_segments = relations[:, :1, None], relations[:, 1:, None]  # (G, 1, 1)
    index = start + (
        batch.segments[queries][:, :, None] * num_segments + batch.segments[keys.items][:, None, :]
    )
    relation = batch.relations[index].long()  # (G, Q, L)
    relative = keys.items[:, None, :] - queries[:, :, None]  # (G, Q, L), k - q
    rows = bias.rows(relative, relation)
    context = batch.context
    visible = context[keys.items][:, None, :] | (~context[queries][:, :, None] & (relative <= 0))
    # Padding queries see everything, so that no row is empty (an empty softmax is NaN).
    visible = (visible & keys.valid[:, None, :]) | ~query_valid[:, :, None]
    return torch.where(visible, rows, bias.hidden_row)


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same values [G, H, Q, L] as CUDA's memory-efficient kernel wants them to lie.

    It takes a mask whose rows are contiguous and begin at multiples of 8 values, and copies any
    other: once for every layer, and keeps the copies for the backward pass.
    """
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % 8)).contiguous()[..., :length]


class GroupedAttention:
    """Attention of each record with itself, for all layers of one forward pass."""

    def __init__(
        self, layout: GroupLayout, bias: PositionBias, dtype: torch.dtype, dropout_p: float
    ) -> None:
        self._layout = layout
        # (G, H, Q, L). Contiguous: a CPU's kernel reads a strided mask one value at a time.
        self._biases = [bias.values(g.rows).to(dtype).contiguous() for g in layout.groups]
        if bias.relative_attention_bias.device.type == "cuda":
            self._biases = [aligned(b) for b in self._biases]
        self._dropout_p = dropout_p

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [N, H, D] of the layout's queries, k and v [T, H, D] -> [N, H, D]."""
        layout = self._layout
        qs = _ToGroups.apply(q, layout.queries)
        ks, vs = (_ToGroups.apply(x, layout.keys) for x in (k, v))
        outputs = []
        for group, bias, *qkv in zip(layout.groups, self._biases, qs, ks, vs, strict=True):
            # (G, H, Q, D), and twice (G, H, L, D)
            gq, gk, gv = (x.unflatten(0, (len(group.rows), -1)).transpose(1, 2) for x in qkv)
            o = F.scaled_dot_product_attention(gq, gk, gv, bias, self._dropout_p)
            outputs.append(o.transpose(1, 2).flatten(0, 1))  # (G*Q, H, D)
        return _FromGroups.apply(layout.queries, *outputs)
