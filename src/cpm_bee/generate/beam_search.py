"""Beam search, as in the reference (docs/format.md §10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpm_bee.encoding import Encoder
from cpm_bee.errors import RunError
from cpm_bee.generate.decoder import Decoder, Token
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer


class Beam(NamedTuple):
    """A running hypothesis: summed log probability, and tokens including the `<s>` of answers."""

    log_p: float
    tokens: tuple[Token, ...]


class FinishedHypotheses:
    """The best `size` finished hypotheses, by mean log probability of their tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._hypotheses: list[tuple[float, tuple[Token, ...]]] = []  # best first

    def add(self, score: float, tokens: tuple[Token, ...]) -> None:
        self._hypotheses.append((score, tokens))
        # The sort is stable: among equal scores, the first found stays first.
        self._hypotheses.sort(key=lambda hypothesis: -hypothesis[0])
        del self._hypotheses[self._size :]

    def cannot_improve(self, best_log_p: float, step: int) -> bool:
        """Whether `size` are found, and the worst scores at least `best_log_p / step`."""
        full = len(self._hypotheses) == self._size
        return full and self._hypotheses[-1][0] >= best_log_p / step

    def best(self) -> tuple[Token, ...]:
        return self._hypotheses[0][1]


def penalize_repetition(
    logits: torch.Tensor, ids: torch.Tensor, penalty: float, window: int | None
) -> torch.Tensor:
    """Penalize each id among the last `window` of a beam, once.

    Args:
        logits: [B, candidates].
        ids: vocabulary ids written so far, [B, A]; an entry of the extension table counts as the
            id that it shares.
        window: None for all ids.
    """
    if penalty == 1:
        return logits
    ids = ids[:, -window:] if window else ids
    found = logits.gather(1, ids)
    # Scattering the same value twice is harmless: each id is penalized once.
    return logits.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))


class Generator:
    """Writes the answers of records with a model."""

    def __init__(self, model: CPMBee, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)

    def generate(self, record: Record, options: GenerationOptions) -> dict:
        """Returns a copy of a valid record with the model's answers; None for one not reached.

        Ignores the record's own answers. Sets the model to eval mode.

        Raises:
            InputError: a special token of the record has a name that the vocabulary lacks.
            RunError: the model's logits are not finite.
        """
        prompt = Prompt.of(record, self.encoder)
        texts: list[str | None] = [None] * len(prompt.answers)
        if texts:
            for i, pairs in enumerate(self._search(prompt, options)):
                texts[i] = prompt.text(pairs)
        return fill_answers(record, texts)

    @torch.inference_mode()
    def _search(self, prompt: Prompt, options: GenerationOptions) -> list[list[tuple[int, int]]]:
        """Returns the (id, sub) pairs of each answer reached, without `<s>` and `</s>`."""
        self.model.eval()
        decoder = Decoder(self.model, self.tokenizer, prompt)
        tokens = _Search(decoder, self.tokenizer, len(prompt.answers), options).run()
        answers: list[list[tuple[int, int]]] = [[] for _ in range(tokens[-1].answer + 1)]
        for token in tokens:
            if token.position > 0:  # position 0 is `<s>`
                answers[token.answer].append((token.id, token.sub))
        return answers


class _Search:
    """The beam search of one prompt."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, num_answers: int, options: GenerationOptions
    ) -> None:
        self._decoder = decoder
        self._bos, self._eos = tokenizer.bos, tokenizer.eos
        self._num_answers = num_answers
        self._options = options
        self._finished = FinishedHypotheses(options.beam_size)

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
        return self._finished.best()

    def _candidates(
        self, beams: Sequence[Beam], parents: Sequence[int]
    ) -> list[tuple[float, int, int]]:
        """Returns the 2 * beam_size best continuations (summed log p, beam, number), best first."""
        logits = self._decoder.logits([beam.tokens for beam in beams], parents)
        ids = torch.tensor([[t.id for t in beam.tokens] for beam in beams], device=logits.device)
        logits = penalize_repetition(
            logits, ids, self._options.repetition_penalty, self._options.repetition_window
        )
        before = torch.tensor([beam.log_p for beam in beams], device=logits.device)
        total = (logits.log_softmax(dim=-1) + before[:, None]).flatten()
        top, numbers = total.topk(min(2 * self._options.beam_size, len(total)))
        values = top.tolist()
        if not values[0] > float("-inf"):  # topk puts NaN first
            raise RunError(
                "the model's logits are not finite: the weights are broken, or the range of "
                "--dtype is too small for them (--dtype fp32 has the largest)"
            )
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
                self._finished.add(score, tokens if closes else (*tokens, following))
                continue
            if closes:
                following = Token(self._bos, 0, last.answer + 1, 0)
            next_beams.append(Beam(log_p, (*tokens, following)))
            parents.append(parent)
            if len(next_beams) == self._options.beam_size:
                break
        return next_beams, parents
