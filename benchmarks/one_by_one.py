"""Beam search for one record at a time, as generation was before records shared batches.

This is the baseline of benchmarks/generation.py and not used otherwise. It runs a prompt once, then
one token of each beam and step: a cache is copied and reordered in each step, one record's beams
share products, and each candidate is a Python object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.generate.job import FinishedHypotheses
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias
from cpm_bee.model.layers import AttentionFunction
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer


class BeamCache:
    """The keys and values of the beams of one record, by layer.

    A beam of the next step continues one of the last step: `continue_beams` says which, and
    `append` reorders the keys and values of its layer.
    """

    def __init__(self) -> None:
        self._prompt: dict[int, KeyValue] = {}  # (H, P, D)
        self._answers: dict[int, KeyValue] = {}  # (B, H, A, D)
        self._parents: torch.Tensor | None = None

    def set_prompt(self, layer: int, prompt: KeyValue) -> None:
        self._prompt[layer] = prompt

    def prompt(self, layer: int) -> KeyValue:
        return self._prompt[layer]

    def continue_beams(self, parents: torch.Tensor) -> None:
        """Set the beam of the last step that each beam of the next one continues, [B]."""
        self._parents = parents

    def append(self, layer: int, new: KeyValue) -> KeyValue:
        """Append a token to each beam, (B, H, 1, D); call it once for each layer and step."""
        if layer in self._answers:
            assert self._parents is not None, "continue_beams comes before each step"
            k, v = (x.index_select(0, self._parents) for x in self._answers[layer])
            new = KeyValue(torch.cat([k, new.k], dim=2), torch.cat([v, new.v], dim=2))
        self._answers[layer] = new
        return new


class KeyValue(NamedTuple):
    """Keys and values of one layer, (H, P, D) for the prompt and (B, H, A, D) for answers."""

    k: torch.Tensor
    v: torch.Tensor


class AnswerTokens(NamedTuple):
    """The tokens of B sequences after the prompt, newest last."""

    ids: torch.Tensor  # (B, A) vocabulary ids
    subs: torch.Tensor  # (B, A) number of the extension entry of its id; 0 for ordinary tokens
    answers: torch.Tensor  # (B, A) the answer that a token belongs to, from 0
    positions: torch.Tensor  # (B, A) position within the answer


class Prefill:
    """A prompt that has been run: its KV cache, and the biases of answers."""

    def __init__(
        self, prompt: Batch, answers: Sequence[int], bias: PositionBias, cache: BeamCache
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
        bias = model.position_bias
        self._prefill = Prefill(batch, prompt.answers, bias, self._cache)
        h = model.input_embedding(batch.ids, batch.subs)  # (P, dim_model)
        attend = PaddedAttention(PaddedGroups.of(batch, bias), bias, h.dtype, 0.0)
        model.encoder(h, self._prefill.caching(attend))

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
        tokens = AnswerTokens(*written.unbind(-1))
        attend = CachedAttention(self._prefill, tokens)
        h = self._model.decode(tokens.ids[:, -1], tokens.subs[:, -1], attend)
        prompt = self._prefill.prompt
        logits = self._model.input_embedding.logits(h, prompt.extension_ids, prompt.extension_subs)
        logits = logits.float()
        logits[:, self._forbidden] = float("-inf")
        return logits


class Beam(NamedTuple):
    """A running hypothesis: summed log probability, and tokens including the `<s>` of answers."""

    log_p: float
    tokens: tuple[Token, ...]


class Search:
    """The beam search of one prompt."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, num_answers: int, options: GenerationOptions
    ) -> None:
        self._decoder = decoder
        self._bos, self._eos = tokenizer.bos, tokenizer.eos
        self._num_answers = num_answers
        self._options = options
        self._finished = FinishedHypotheses(options.num_beams)

    def run(self) -> tuple[Token, ...]:
        """Returns the tokens of the best hypothesis, with the `<s>` but no `</s>` of answers."""
        beams = [Beam(0.0, (Token(self._bos, 0, 0, 0),))]
        parents = [0]
        last_step = self._options.max_length + 1
        for step in range(last_step + 1):
            candidates = self._candidates(beams, parents)
            if self._finished.cannot_improve(candidates[0][0], step):
                break
            beams, parents = self._advance(beams, candidates, is_last=step == last_step)
            if not beams:
                break
        return self._finished.hypotheses[0].tokens  # type: ignore[return-value]

    def _candidates(
        self, beams: Sequence[Beam], parents: Sequence[int]
    ) -> list[tuple[float, int, int]]:
        """Returns the 2 * beam_size best continuations (summed log p, beam, number), best first."""
        logits = self._decoder.logits([beam.tokens for beam in beams], parents)
        before = torch.tensor([beam.log_p for beam in beams], device=logits.device)
        total = (logits.log_softmax(dim=-1) + before[:, None]).flatten()
        top, numbers = total.topk(min(2 * self._options.num_beams, len(total)))
        values = top.tolist()
        return [
            (value, *divmod(number, logits.shape[1]))
            for value, number in zip(values, numbers.tolist(), strict=True)
            if value > float("-inf")
        ]

    def _advance(
        self, beams: Sequence[Beam], candidates: list[tuple[float, int, int]], *, is_last: bool
    ) -> tuple[list[Beam], list[int]]:
        """Finish hypotheses and make the next beams, with the index of the beam each continues."""
        next_beams: list[Beam] = []
        parents: list[int] = []
        for log_p, parent, number in candidates:
            tokens = beams[parent].tokens
            closes = number == self._eos
            last = tokens[-1]
            following = Token(*self._decoder.pair(number), last.answer, last.position + 1)
            if is_last or (closes and last.answer + 1 == self._num_answers):
                # Each token so far, `<s>` included, has predicted the next one.
                score = log_p / len(tokens)
                self._finished.add(score, tokens if closes else (*tokens, following))  # type: ignore[arg-type]
                continue
            if closes:
                following = Token(self._bos, 0, last.answer + 1, 0)
            next_beams.append(Beam(log_p, (*tokens, following)))
            parents.append(parent)
            if len(next_beams) == self._options.num_beams:
                break
        return next_beams, parents
