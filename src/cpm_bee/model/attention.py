"""The position bias, and attention over the flat stream with PyTorch's SDPA.

A batch is a flat stream [T, ...] of records that do not attend to each other. SDPA needs padded
tensors, so the records are sorted by length and divided into groups of similar length; within a
group, queries and keys are padded to the longest record and go through one call of
`scaled_dot_product_attention`. `_GROUP_SHARE` bounds the cost of padding keys. Everything else in
the model runs on the flat stream without padding.

`PaddedGroups` is computed once per batch: for each group, the row of the bias table for each
(query, key) pair, with a row of -inf for pairs that are not visible, and the gather indices that
pad and unpad. Padded queries see every key, because a softmax over nothing is NaN; their outputs
are never read. `PaddedAttention` looks up the biases once for all layers.

Padding and unpadding are custom autograd functions: each token has exactly one slot that is read
back, so forward and backward of both are gathers. PyTorch's gradient of indexing is a scatter-add,
which is slower. Hazard: `_Pad` drops the gradients of padding. They are zero only because `_Unpad`
gives padded queries an output gradient of zero and no other query sees a padded key; if padding
were visible, the gradients of all slots of a token would have to be summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.buffers import buffer_pool
from cpm_bee.segments import HIDDEN, NUM_DEPTHS

# Each record of a group has at least this share of the longest one's length.
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
        """The row for each relative position k - q within one segment; any shape, int64."""
        half = self.num_buckets // 2
        exact = half // 2
        distance = relative.abs()
        # In fp32, like the reference: rounding decides at the boundary of a bucket.
        far = torch.log(distance.clamp(min=1).float() / exact)
        far = far / math.log(self.max_distance / exact) * (half - exact)
        far = torch.clamp(exact + far.to(torch.int64), max=half - 1)
        return (relative > 0).long() * half + torch.where(distance < exact, distance, far)

    def check_relations(self, relation: torch.Tensor) -> None:
        """Raise `InputError` if the table has no row for a segment relation.

        This is possible only if the table has fewer segment buckets than there are relations.
        """
        if self.num_segment_buckets < NUM_DEPTHS * NUM_DEPTHS and relation.numel():
            largest = int(torch.where(relation == HIDDEN, 0, relation).max())
            if largest > self.num_segment_buckets:
                raise InputError(
                    f"a record needs segment bucket {largest} of the position bias, this model "
                    f"has {self.num_segment_buckets}: its fields are nested too deeply"
                )

    def rows(self, position: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Rows from positions k - q and segment relations of the same shape.

        Where a relation is `segments.HIDDEN`, the row is that of what is not visible.

        Raises:
            InputError: see `check_relations`.
        """
        self.check_relations(relation)
        other = torch.where(relation == HIDDEN, self.masked_row, self.num_buckets - 1 + relation)
        return torch.where(relation == 0, self.position_rows(position), other)

    @property
    def masked_row(self) -> int:
        """The row for pairs that are not visible: one past the table, see `values`."""
        return self.num_rows

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """The biases of rows [G, Q, K] -> [G, heads, Q, K]; -inf where not visible."""
        table = self.relative_attention_bias
        masked = table.new_full((1, table.shape[1]), float("-inf"))
        return F.embedding(rows, torch.cat([table, masked])).permute(0, 3, 1, 2)


class _PaddedGroup(NamedTuple):
    """Consecutive tokens of each of G records, padded to the longest, W."""

    tokens: torch.Tensor  # (G, W) indices into the stream; padding repeats the last one
    valid: torch.Tensor  # (G, W) bool

    @classmethod
    def of(cls, starts: list[int], counts: list[int], device: torch.device) -> _PaddedGroup:
        start, count = (torch.tensor(v, device=device)[:, None] for v in (starts, counts))
        offset = torch.arange(max(counts), device=device)  # (W,)
        return cls(start + torch.minimum(offset, count - 1), offset < count)


class PaddedIndices(NamedTuple):
    """Gather indices between N tokens of the stream and the P concatenated slots of all groups."""

    pad: torch.Tensor  # (P,) the token in each slot; padding repeats some token
    unpad: torch.Tensor  # (N,) the slot of each token
    padding: torch.Tensor  # (P - N,) the slots that are padding
    sizes: list[int]  # number of slots of each group

    @classmethod
    def of(cls, groups: list[_PaddedGroup]) -> PaddedIndices:
        pad = torch.cat([group.tokens.flatten() for group in groups])
        valid = torch.cat([group.valid.flatten() for group in groups])
        unpad = torch.empty_like(pad[: int(valid.sum())])
        unpad[pad[valid]] = torch.nonzero(valid).squeeze(1)
        sizes = [group.tokens.numel() for group in groups]
        return cls(pad, unpad, torch.nonzero(~valid).squeeze(1), sizes)


def _gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    out = buffer_pool.empty(x, len(indices), *x.shape[1:])
    return torch.index_select(x, 0, indices, out=out)


def _concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = sum(len(part) for part in parts)
    return torch.cat(list(parts), out=buffer_pool.empty(parts[0], rows, *parts[0].shape[1:]))


class _Pad(torch.autograd.Function):
    """x [N, ...] -> the slots of each group. The gradients of padding are dropped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, indices: PaddedIndices) -> tuple[torch.Tensor, ...]:
        ctx.indices = indices
        return _gather(x, indices.pad).split(indices.sizes)

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        return _gather(_concatenate(g), ctx.indices.unpad), None


class _Unpad(torch.autograd.Function):
    """The slots of each group -> [N, ...] without the padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, indices: PaddedIndices, *parts: torch.Tensor) -> torch.Tensor:
        ctx.indices = indices
        return _gather(_concatenate(parts), indices.unpad)

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        indices = ctx.indices
        padded = _gather(g[0], indices.pad).index_fill_(0, indices.padding, 0)
        return None, *padded.split(indices.sizes)


@dataclass(frozen=True)
class PaddedGroups:
    """How the records of one batch are grouped and padded for attention."""

    rows: tuple[torch.Tensor, ...]  # for each group (G, Q, K), rows of the bias table
    queries: PaddedIndices
    keys: PaddedIndices

    @classmethod
    def of(cls, batch: Batch, bias: PositionBias, *, at_targets: bool = False) -> PaddedGroups:
        """Group a batch, with every token as a query or only the positions that have a target."""
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
        rows: list[torch.Tensor] = []
        query_groups: list[_PaddedGroup] = []
        key_groups: list[_PaddedGroup] = []
        while order:
            longest = batch.lengths[order[0]]
            size = sum(batch.lengths[r] >= _GROUP_SHARE * longest for r in order)
            members, order = order[:size], order[size:]
            queries = _PaddedGroup.of(
                [query_starts[r] for r in members], [counts[r] for r in members], device
            )
            keys = _PaddedGroup.of(
                [starts[r] for r in members], [batch.lengths[r] for r in members], device
            )
            relations = torch.tensor(
                [(relation_starts[r], batch.num_segments[r]) for r in members], device=device
            )
            query_positions = positions[queries.tokens]  # (G, Q)
            rows.append(_rows(batch, bias, query_positions, queries.valid, keys, relations))
            query_groups.append(queries)
            key_groups.append(keys)
        return cls(tuple(rows), PaddedIndices.of(query_groups), PaddedIndices.of(key_groups))


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
    keys: _PaddedGroup,
    relations: torch.Tensor,
) -> torch.Tensor:
    """Bias rows [G, Q, K] for queries [G, Q], given as positions in the stream."""
    start, num_segments = relations[:, :1, None], relations[:, 1:, None]  # (G, 1, 1)
    index = start + (
        batch.segments[queries][:, :, None] * num_segments + batch.segments[keys.tokens][:, None, :]
    )
    relation = batch.relations[index].long()  # (G, Q, K)
    relative = keys.tokens[:, None, :] - queries[:, :, None]  # (G, Q, K), k - q
    rows = bias.rows(relative, relation)
    context = batch.context
    visible = context[keys.tokens][:, None, :] | (~context[queries][:, :, None] & (relative <= 0))
    # Padded queries see every key: an empty softmax is NaN.
    visible = (visible & keys.valid[:, None, :]) | ~query_valid[:, :, None]
    return torch.where(visible, rows, bias.masked_row)


def align_bias(bias: torch.Tensor) -> torch.Tensor:
    """Returns the bias [G, H, Q, K] in the layout that CUDA's memory-efficient kernel needs.

    Rows are contiguous and begin at multiples of 8 values. The kernel would copy a mask of any
    other layout for every layer, and keep the copies for the backward pass.
    """
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % 8)).contiguous()[..., :length]


class PaddedAttention:
    """Attention within each record, for all layers of one forward pass."""

    def __init__(
        self, groups: PaddedGroups, bias: PositionBias, dtype: torch.dtype, dropout_p: float
    ) -> None:
        self._groups = groups
        # (G, H, Q, K). Contiguous, because the CPU kernel reads strided masks value by value.
        self._biases = [bias.values(rows).to(dtype).contiguous() for rows in groups.rows]
        if bias.relative_attention_bias.device.type == "cuda":
            self._biases = [align_bias(b) for b in self._biases]
        self._dropout_p = dropout_p

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [N, H, D], k and v [T, H, D] -> [N, H, D]."""
        queries, keys = self._groups.queries, self._groups.keys
        qs = _Pad.apply(q, queries)
        ks, vs = (_Pad.apply(x, keys) for x in (k, v))
        outputs = []
        for bias, *qkv in zip(self._biases, qs, ks, vs, strict=True):
            # (G*Q, H, D) -> (G, H, Q, D), and likewise for G*K keys and values
            gq, gk, gv = (x.unflatten(0, (len(bias), -1)).transpose(1, 2) for x in qkv)
            o = F.scaled_dot_product_attention(gq, gk, gv, bias, self._dropout_p)
            outputs.append(o.transpose(1, 2).flatten(0, 1))  # (G, H, Q, D) -> (G*Q, H, D)
        return _Unpad.apply(queries, *outputs)
