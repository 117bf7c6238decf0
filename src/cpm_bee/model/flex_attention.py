"""Attention over the flat stream with PyTorch's FlexAttention: no bias or mask in memory.

FlexAttention (torch.nn.attention.flex_attention) runs over the whole stream [T] at once, without
padding. It compiles two functions of a (query, key) pair into its kernel:

- `mask_mod`: whether the query sees the key: both are in the same record, and the key is context,
  or the query is predicted and the key is not later; with in-context samples, also whether the
  relation of their segments is not `HIDDEN`. A block mask is made from it once per batch;
  blocks of 128 x 128 pairs with no visible pair are skipped, so the work grows with the records'
  lengths, not with T².
- `score_mod`: adds the entry of the bias table, looked up from the distance within a segment or
  from the relation of two segments. Gradients of the table come from the same kernel.

The result equals that of `PaddedAttention` up to rounding. It is used only on request, and where
`flex_probe` has seen that it works. Hazards: there is no backward pass on the CPU and no dropout
(`unavailable_reason`); `score_mod` is also evaluated for masked pairs, so its indices must exist
for every pair; it has not been measured on a GPU yet.

Each function is compiled once for each of its variants: with and without gradients, of q alone or
of k and v too, one block of keys or more, all tokens or only the targets as queries. Beyond
PyTorch's limit, 8, it would run uncompiled, which lays out all scores (13 GB in fp32 for 32 heads
and 10,240 tokens). The limit is therefore higher, and `fullgraph` makes it an error to reach it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from cpm_bee.data.batch import Batch
from cpm_bee.errors import InputError, RunError
from cpm_bee.model.attention import PositionBias
from cpm_bee.segments import HIDDEN, OTHER_SAMPLE

SDPA, FLEX = "sdpa", "flex"

# The kernels need this compute capability or later.
_CAPABILITY = (8, 0)
_RECOMPILE_LIMIT = 64
_BACKEND = "inductor"


def unavailable_reason(device: torch.device, dropout_p: float) -> str | None:
    """The reason why FlexAttention cannot be used; None if it can."""
    if device.type != "cuda":
        return f"it has no backward pass on a {device.type}"
    if dropout_p:
        return "it has no dropout"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"the GPU's compute capability is below {_CAPABILITY[0]}.{_CAPABILITY[1]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def refuse_if_unavailable(device: torch.device, dropout_p: float) -> None:
    """Raise `InputError` if `--attention flex` cannot work; trying it is left to `flex_probe`."""
    if reason := unavailable_reason(device, dropout_p):
        raise InputError(f"--attention flex: {reason}; --attention sdpa works everywhere")


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    compile_function: Any = torch.compile  # its types lack `recompile_limit`
    # Dynamic, because the number of tokens differs in every batch.
    compiled = compile_function(
        function,
        backend=_BACKEND,
        dynamic=True,
        fullgraph=True,
        recompile_limit=_RECOMPILE_LIMIT,
    )

    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return compiled(*arguments, **options)
        except FailOnRecompileLimitHit:
            raise RunError(
                f"--attention flex: it needs more than {_RECOMPILE_LIMIT} compiled variants for "
                "these batches; --attention sdpa needs none"
            ) from None

    return call


class FlexAttention:
    """Attention within each record, for all layers of one forward pass.

    Args:
        at_targets: use only positions that have a target as queries.
    """

    def __init__(self, batch: Batch, bias: PositionBias, *, at_targets: bool = False) -> None:
        # Imported here because it loads the compiler, which takes 70 MiB.
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        bias.check_relations(batch.relations)
        device = batch.ids.device
        positions = torch.arange(batch.num_tokens, device=device)
        queries = batch.target_positions if at_targets else positions
        self._score = _score_mod(batch, bias, queries)
        make_mask, self._attend = _compiled(create_block_mask), _compiled(flex_attention)
        with torch.no_grad():  # one variant less to compile
            self._mask = make_mask(
                _mask_mod(batch, queries), None, None, len(queries), batch.num_tokens, device=device
            )

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [N, H, D], k and v [T, H, D] -> [N, H, D]."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N or T, D)
        o = self._attend(q, k, v, score_mod=self._score, block_mask=self._mask)
        return o[0].transpose(0, 1)  # (1, H, N, D) -> (N, H, D)


def _records(batch: Batch) -> torch.Tensor:
    """The record of each token, [T]."""
    lengths = torch.tensor(batch.lengths, device=batch.ids.device)
    numbers = torch.arange(len(batch.lengths), device=batch.ids.device)
    return torch.repeat_interleave(numbers, lengths, output_size=batch.num_tokens)


def _mask_mod(batch: Batch, queries: torch.Tensor) -> Callable[..., torch.Tensor]:
    record, context = _records(batch), batch.context

    def visible(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        position = queries[q]
        seen = context[k] | (~context[position] & (k <= position))
        return seen & (record[position] == record[k])

    if not batch.has_samples:
        return visible
    relations, begin = _relations(batch)
    segments = batch.segments

    def visible_in_sample(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible(b, h, q, k) & (relations[begin[queries[q]] + segments[k]] != HIDDEN)

    return visible_in_sample


def _relations(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The relations, and for each token the index of its segment's with segment 0 of its record."""
    num_segments = torch.tensor(batch.num_segments, device=batch.ids.device)
    squares = num_segments.square()
    starts = squares.cumsum(0) - squares
    record = _records(batch)
    begin = starts[record] + batch.segments * num_segments[record]
    # A masked key may belong to a record with more segments: its index must exist.
    return F.pad(batch.relations.int(), (0, max(batch.num_segments))), begin


def _score_mod(
    batch: Batch, bias: PositionBias, queries: torch.Tensor
) -> Callable[..., torch.Tensor]:
    device, tokens = batch.ids.device, batch.num_tokens
    relations, begin = _relations(batch)
    if batch.has_samples:  # whatever is masked needs some row
        relations = torch.where(relations == HIDDEN, OTHER_SAMPLE, relations)
    distances = torch.arange(1 - tokens, tokens, device=device)
    by_distance = bias.position_rows(distances).int()
    table, segments, last_position_row = (
        bias.relative_attention_bias,
        batch.segments,
        bias.num_buckets - 1,
    )

    def add_bias(
        score: torch.Tensor, b: Any, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        position = queries[q]
        relation = relations[begin[position] + segments[k]]
        in_segment = by_distance[k - position + tokens - 1]
        row = torch.where(relation == 0, in_segment, last_position_row + relation)
        return score + table[row, h]

    return add_bias
