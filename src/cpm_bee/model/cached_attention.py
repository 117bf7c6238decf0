"""Attention of one decoding step, for the beams of several records at once.

Each record has a slot in the cache of keys and values. Its keys are, in this order: the prompt,
with the `<s>` of the first answer as its last token; then one key for each beam and step. All beams
of a record attend to all keys of its slot in one product, so each key is read once per step, and
the bias says what a beam sees: it is -inf for keys of other beams that are not its ancestors. Keys
and values are therefore never copied or reordered when a beam continues another one. Only the bias
changes, which is small.

Prompts are aligned to the right: in every slot the prompt ends at column `prompt_columns`, so the
columns in use of neighbouring slots are one window, and the products of these records are one
`bmm`. The columns before a shorter prompt are masked.

An answer's segment is never one of the prompt's, so the bias between a token and the prompt depends
only on the token's answer: it is set when a record starts or a beam begins another answer, not in
each step. Between tokens of answers, the bias depends on the distance and is set in each step.

The softmax over both parts gives the result of a pass over the whole sequence without a cache, up
to rounding. Hazard: masked columns are multiplied by 0, so the values there must be finite; the
cache begins with zeros.

Shapes: R records with B beams each, H heads of dimension D, W columns of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from cpm_bee.model.attention import PositionBias


class KeyValue(NamedTuple):
    """Keys and values of one layer."""

    k: torch.Tensor
    v: torch.Tensor


class Window(NamedTuple):
    """Neighbouring slots, and the columns that some of them use."""

    slots: slice
    columns: slice


class KeyValueCache(Protocol):
    """The interface of a KV cache."""

    def write(self, layer: int, rows: torch.Tensor, new: KeyValue) -> None:
        """Store keys and values [N, H, D] in rows [N * H] of the cache."""
        ...

    def window(self, layer: int, window: Window) -> KeyValue:
        """Its keys and values, [R * H, W, D]."""
        ...


class BeamBias:
    """The bias between the newest token of each beam and each column of its slot."""

    def __init__(
        self,
        position_bias: PositionBias,
        shape: tuple[int, int, int],
        prompt_columns: int,
        dtype: torch.dtype,
    ) -> None:
        """`shape` is (slots, beams, columns)."""
        table = position_bias.relative_attention_bias
        slots, beams, columns = shape
        self._position_bias = position_bias
        self._prompt_columns = prompt_columns
        self._beams = torch.arange(beams, device=table.device)
        self._values = torch.full(
            (slots, table.shape[1], beams, columns),
            -math.inf,
            dtype=dtype,
            device=table.device,
        )

    def set_prompt(self, slot: int, relations: torch.Tensor) -> None:
        """Set the bias between each beam's answer and the prompt, from relations [B, P]."""
        rows = self._position_bias.rows(torch.zeros_like(relations), relations)  # (B, P)
        values = self._position_bias.values(rows[None])[0]  # (H, B, P)
        begin = self._prompt_columns - 1 - relations.shape[1]  # the last column is <s>
        self._values[slot, :, :, :begin] = -math.inf
        self._values[slot, :, :, begin : self._prompt_columns - 1] = values

    def set_answers(
        self, relations: torch.Tensor, distances: torch.Tensor, writers: torch.Tensor
    ) -> None:
        """Set the bias between the newest token of each beam and the tokens of answers.

        Args:
            relations: segment relations to each token that the beam has written, [R, B, A].
            distances: position of that token minus the newest token's, [R, B, A].
            writers: the beam that wrote it, in whose column it is; -1 for none, [R, B, A].
        """
        bias = self._position_bias
        rows = bias.rows(distances, relations)  # (R, B, A)
        written = writers[:, :, 1:, None] == self._beams  # (R, B, A - 1, B)
        own = torch.where(written, rows[:, :, 1:, None], bias.masked_row).flatten(2)
        rows = torch.cat([rows[:, :, :1], own], dim=2)  # (R, B, 1 + (A - 1) * B)
        begin = self._prompt_columns - 1
        columns = slice(begin, begin + rows.shape[2])
        self._values[: len(rows), :, :, columns] = bias.values(rows)

    def move(self, source: int, target: int) -> None:
        self._values[target] = self._values[source]

    def window(self, window: Window) -> torch.Tensor:
        """(R * H, B, W)."""
        return self._values[window.slots, :, :, window.columns].flatten(0, 1)


class BeamAttention:
    """The attention function of one step, for all layers: q, k, v [R * B, H, D] -> the same.

    The windows together cover all slots in use, in order.
    """

    def __init__(
        self, cache: KeyValueCache, rows: torch.Tensor, bias: BeamBias, windows: Sequence[Window]
    ) -> None:
        """`rows` [R * B * H] are those of the cache for the new keys and values."""
        self._cache, self._rows = cache, rows
        self._windows = [(window, bias.window(window)) for window in windows]
        self._num_slots = windows[-1].slots.stop

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self._cache.write(layer, self._rows, KeyValue(k, v))
        scale = 1 / math.sqrt(q.shape[2])
        q = q.unflatten(0, (self._num_slots, -1)).transpose(1, 2)  # (R, H, B, D)
        outputs = []
        for window, bias in self._windows:
            keys, values = self._cache.window(layer, window)  # (r * H, W, D)
            queries = q[window.slots].flatten(0, 1).to(keys.dtype)  # (r * H, B, D)
            scores = torch.baddbmm(bias, queries, keys.mT, alpha=scale)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
            outputs.append(torch.bmm(weights, values))  # (r * H, B, D)
        out = torch.cat(outputs).unflatten(0, (self._num_slots, -1))  # (R, H, B, D)
        return out.transpose(1, 2).flatten(0, 1)
