"""Runs the model on a prompt and its beams, for the logits of each beam's next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpm_bee.data.batch import collate, extension_pairs
from cpm_bee.generate.kv_cache import BeamCache
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.cached_attention import AnswerTokens
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer


class Token(NamedTuple):
    """A token: its (id, sub) pair, the number of its answer (from 0), and its position there."""

    id: int
    sub: int
    answer: int
    position: int


class Decoder:
    """Runs the prompt once, then one token per beam and step, with a KV cache.

    Candidates are numbered as in training: the vocabulary, then the record's (id, sub > 0) pairs.
    """

    def __init__(self, model: CPMBee, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self._model = model
        self._device = model.input_embedding.weight.device
        self._vocab_size = len(tokenizer)
        self._pairs = extension_pairs([prompt.encoded])
        self._forbidden = [] if prompt.has_unknown else [tokenizer.unk]
        self._cache = BeamCache()
        batch = collate([prompt.encoded], tokenizer).to(self._device)
        self._prefill = model.prefill(batch, prompt.answers, self._cache)

    def pair(self, candidate: int) -> tuple[int, int]:
        """Returns the (id, sub) pair of a candidate."""
        extra = candidate - self._vocab_size
        return self._pairs[extra] if extra >= 0 else (candidate, 0)

    def logits(self, beams: Sequence[Sequence[Token]], parents: Sequence[int]) -> torch.Tensor:
        """Returns the logits of each beam's next token, fp32 [B, candidates]; -inf if forbidden.

        Args:
            beams: all tokens of each beam after the prompt; the last one is new to the model.
            parents: the index of the beam of the last call that each beam continues.
        """
        written = torch.tensor(beams, device=self._device)  # (B, A, 4), as in Token
        self._cache.continue_beams(torch.tensor(parents, device=self._device))
        logits = self._model.decode(AnswerTokens(*written.unbind(-1)), self._prefill).float()
        logits[:, self._forbidden] = float("-inf")
        return logits
