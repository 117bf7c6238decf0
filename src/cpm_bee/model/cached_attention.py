"""Attention with a KV cache, for generation.

A prompt is run once (`CPMBee.prefill`); then each step runs one new token of each of B sequences
(`CPMBee.decode`), whose query attends to two sets of keys:

- the keys of the prompt, shared by all sequences. One product q Kᵀ computes the scores of all
  sequences, so its time hardly depends on the number of beams. An answer's segment is never one of
  the prompt's, so the bias depends only on the pair of segments and comes from a table with a row
  for each answer.
- the keys of its own tokens, including the new one. Within a segment the bias depends on the
  distance, between answers on the pair of segments.

Both sets of scores go through one softmax, so the result equals that of a pass over the whole
sequence without a cache, up to rounding. A `KeyValueCache` stores keys and values without biases.
Hazard: `decode` appends to the cache, so it must be called exactly once per token, and the caller
must reorder the cache first if beams have changed their order.

To decode several records at once, only this attention function would have to change: everywhere
else, `decode` computes each row by itself.

Shapes: B sequences, P prompt tokens, A answer tokens, H heads of dimension D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from cpm_bee.data.batch import Batch
from cpm_bee.model.attention import PositionBias
from cpm_bee.model.layers import AttentionFunction


class KeyValue(NamedTuple):
    """Keys and values of one layer, (H, P, D) for the prompt and (B, H, A, D) for answers."""

    k: torch.Tensor
    v: torch.Tensor


class KeyValueCache(Protocol):
    """The interface of a KV cache."""

    def set_prompt(self, layer: int, prompt: KeyValue) -> None:
        """Store the prompt's keys and values of a layer."""

    def prompt(self, layer: int) -> KeyValue:
        """The prompt's keys and values of a layer."""
        ...

    def append(self, layer: int, new: KeyValue) -> KeyValue:
        """Append one token to each sequence, (B, H, 1, D); returns all tokens, newest last."""
        ...


class AnswerTokens(NamedTuple):
    """The tokens of B sequences after the prompt, newest last."""

    ids: torch.Tensor  # (B, A) vocabulary ids
    subs: torch.Tensor  # (B, A) number of the extension entry of its id; 0 for ordinary tokens
    answers: torch.Tensor  # (B, A) the answer that a token belongs to, from 0
    positions: torch.Tensor  # (B, A) position within the answer


class Prefill:
    """A prompt that has been run: its KV cache, and the biases of answers."""

    def __init__(
        self, prompt: Batch, answers: Sequence[int], bias: PositionBias, cache: KeyValueCache
    ) -> None:
        self.prompt = prompt
        self.cache = cache
        self._bias = bias
        (size,) = prompt.num_segments  # of one record
        segments = torch.tensor(answers, device=prompt.ids.device)
        relations = prompt.relations.view(size, size).long()[segments]  # (answers, S)
        self._relations = relations[:, segments]  # (answers, answers)
        to_prompt = relations[:, prompt.segments]  # (answers, P)
        # Never the same segment, so the distance does not matter.
        rows = bias.rows(torch.zeros_like(to_prompt), to_prompt)
        self._prompt_bias = bias.values(rows.unsqueeze(0)).squeeze(0)  # (H, answers, P)

    def caching(self, attend: AttentionFunction) -> AttentionFunction:
        """Returns `attend`, wrapped so that it also stores keys and values in the cache."""

        def attend_and_keep(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            # (P, H, D) -> (H, P, D), contiguous because every later step reads them in this order
            kept = KeyValue(k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
            self.cache.set_prompt(layer, kept)
            return attend(layer, q, k, v)

        return attend_and_keep

    def prompt_bias(self, tokens: AnswerTokens) -> torch.Tensor:
        """The bias between each sequence's new token and the prompt, (H, B, P)."""
        return self._prompt_bias.index_select(1, tokens.answers[:, -1])

    def answer_bias(self, tokens: AnswerTokens) -> torch.Tensor:
        """The bias between each sequence's new token and its own tokens, (B, H, 1, A)."""
        relation = self._relations[tokens.answers[:, -1:], tokens.answers]  # (B, A)
        distance = tokens.positions - tokens.positions[:, -1:]  # (B, A), k - q
        return self._bias.values(self._bias.rows(distance, relation).unsqueeze(1))


class CachedAttention:
    """The attention function of one step, for all layers: q, k, v [B, H, D] -> [B, H, D]."""

    def __init__(self, prefill: Prefill, tokens: AnswerTokens) -> None:
        self._cache = prefill.cache
        self._prompt_bias = prefill.prompt_bias(tokens)  # (H, B, P)
        self._answer_bias = prefill.answer_bias(tokens)  # (B, H, 1, A)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        prompt = self._cache.prompt(layer)
        answers = self._cache.append(layer, KeyValue(k.unsqueeze(2), v.unsqueeze(2)))
        q = q / math.sqrt(q.shape[-1])
        to_prompt = q.transpose(0, 1) @ prompt.k.mT + self._prompt_bias  # (H, B, P)
        to_answers = q.unsqueeze(2) @ answers.k.mT + self._answer_bias  # (B, H, 1, A)
        scores = torch.cat([to_prompt.transpose(0, 1), to_answers.squeeze(2)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # (B, H, P + A)
        on_prompt, on_answers = weights.split([prompt.k.shape[1], answers.k.shape[2]], dim=-1)
        from_prompt = (on_prompt.transpose(0, 1) @ prompt.v).transpose(0, 1)  # (B, H, D)
        from_answers = (on_answers.unsqueeze(2) @ answers.v).squeeze(2)  # (B, H, D)
        return from_prompt + from_answers
