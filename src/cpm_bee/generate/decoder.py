"""The model behind a prompt: what each beam may write next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from cpm_bee.data.batch import collate, extension_pairs
from cpm_bee.generate.kv_cache import BeamCache, DecodingStep, PromptAttention
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.attention import GroupedAttention, GroupLayout
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer


class Token(NamedTuple):
    """A token of an answer: what it is, in which answer (from 0), and its place there."""

    id: int
    sub: int
    answer: int
    position: int


class Decoder:
    """Runs the prompt once, then one token a beam and step, with cached keys and values.

    Its candidates are numbered as in training: the vocabulary, then the record's (id, sub > 0)
    pairs.
    """

    def __init__(self, model: CPMBee, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self._model = model
        self._device = model.input_embedding.weight.device
        self._vocab_size = len(tokenizer)
        self._pairs = extension_pairs([prompt.encoded])
        batch = collate([prompt.encoded], tokenizer).to(self._device)
        self._extension = (batch.extension_ids, batch.extension_subs)
        self._forbidden = [] if prompt.has_unknown else [tokenizer.unk]

        bias = model.position_bias
        h = model.input_embedding(batch.ids, batch.subs)  # (P, dim_model)
        attend = GroupedAttention(GroupLayout.of(batch, bias), bias, h.dtype, 0.0)
        prompt_attention = PromptAttention(attend)
        model.encoder(h, prompt_attention)
        self._cache = BeamCache(prompt_attention.layers)

        size = len(prompt.encoded.tree.depths)
        answers = torch.tensor(prompt.answers, device=self._device)
        relations = batch.relations.view(size, size).long()[answers]  # (answers, S)
        self._relations = relations[:, answers]
        to_prompt = relations[:, batch.segments]  # (answers, P)
        # Never the same segment, so the positions do not matter.
        rows = bias.rows(torch.zeros_like(to_prompt), to_prompt)
        self._prompt_bias = bias.values(rows.unsqueeze(0)).squeeze(0)  # (H, answers, P)

    def pair(self, candidate: int) -> tuple[int, int]:
        """The (id, sub) of a candidate's number."""
        extra = candidate - self._vocab_size
        return self._pairs[extra] if extra >= 0 else (candidate, 0)

    def logits(self, beams: Sequence[Sequence[Token]], parents: Sequence[int]) -> torch.Tensor:
        """Logits of the next token of each beam, fp32 [B, candidates]; -inf where forbidden.

        Args:
            beams: all tokens of each beam after the prompt; the last one is new to the model.
            parents: the index that each beam's other tokens had in the last call.
        """
        written = torch.tensor(beams, device=self._device)  # (B, A, 4)
        ids, subs, answers, positions = written.unbind(-1)  # each (B, A)
        last = answers[:, -1]
        relation = self._relations[last[:, None], answers]
        rows = self._model.position_bias.rows(positions - positions[:, -1:], relation)
        step = DecodingStep(
            parents=torch.tensor(parents, device=self._device),
            prompt_bias=self._prompt_bias.index_select(1, last),
            answer_bias=self._model.position_bias.values(rows.unsqueeze(1)),
        )
        embedding = self._model.input_embedding
        h = embedding(ids[:, -1], subs[:, -1])  # (B, dim_model)
        h = self._model.encoder(h, partial(self._cache.attend, step))
        h = self._model.encoder.output_layernorm(h)
        logits = embedding.logits(h, *self._extension).float()
        logits[:, self._forbidden] = float("-inf")
        return logits
