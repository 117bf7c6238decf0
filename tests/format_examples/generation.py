"""Section 10: generation."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

import cpm_bee.generate.generator as generator_module
import cpm_bee.generate.job as job_module
from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import penalize_repetition_
from cpm_bee.generate.beams import ID, Beams
from cpm_bee.generate.candidates import GROUP
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.job import FinishedHypotheses
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.network import CPMBee
from cpm_bee.segments import outline
from cpm_bee.tokenizer import Tokenizer
from format_examples.common import VOCABULARY, Json, Rows, example, number, numbers


@example
def prompt_segments(page: Json) -> Rows:
    prompt = Prompt.of(page("two-answers"), Encoder(VOCABULARY))
    texts, _ = outline(page("two-answers"))
    return [
        [str(i), text, str(int((prompt.encoded.segments == i).sum())),
         "answer" if i in prompt.answers else "context"]
        for i, text in enumerate(texts)
    ]  # fmt: skip


# The next token by the last one, with its probability.
CHAIN = {
    "<s>": {"海": 0.6, "天": 0.3, "</s>": 0.1},
    "海": {"</s>": 0.5, "天": 0.4, "海": 0.1},
    "天": {"</s>": 0.9, "海": 0.05, "天": 0.05},
}


@example
def chain(page: Json) -> Rows:
    columns = ["海", "天", "</s>"]
    return [[last, *(f"{p[c]:g}" for c in columns)] for last, p in CHAIN.items()]


class _ChainDecoder(Decoder):
    """Stands for a model whose next token depends on the last one alone, which is the state."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._device = tokenizer, torch.device("cpu")

    def divide(self, shape: Any, beam_size: int) -> None:
        pass

    def prefill(self, prompts: Any, slots: Any) -> torch.Tensor:
        return torch.tensor([VOCABULARY.bos])

    def step(self, beams: Beams, num_slots: int) -> torch.Tensor:
        return torch.from_numpy(beams.newest(num_slots)[:, :, ID].flatten())

    def _next_logits(self, states: torch.Tensor, slots: Any, k: int) -> torch.Tensor:
        size = len(VOCABULARY) + -len(VOCABULARY) % GROUP
        result = torch.full((len(states), size), float("-inf"))
        for row, last in zip(result, states.tolist(), strict=True):
            for token, p in CHAIN[VOCABULARY.tokens[last]].items():
                row[VOCABULARY.ids[token]] = np.log(p)
        return result


@example
def beam_scores(page: Json) -> Rows:
    rows: Rows = []

    class Recording(FinishedHypotheses):
        def add(self, score: float, tokens: Any, *ending: bool) -> None:
            text = " ".join(VOCABULARY.tokens[i] for i in tokens[1:, ID])
            rows.append(["finished", f"{text} </s>", number(score * len(tokens)), number(score)])
            super().add(score, tokens, *ending)

        def cannot_improve(self, best_log_p: float, step: int) -> bool:
            stops = super().cannot_improve(best_log_p, step)
            if stops:
                rows.append(["stop", f"step {step}", number(best_log_p), number(best_log_p / step)])
            return stops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_module, "Decoder", _ChainDecoder)
        patch.setattr(job_module, "FinishedHypotheses", Recording)
        generator = Generator(cast(CPMBee, torch.nn.Identity()), VOCABULARY)
        answer = generator.generate({"<ans>": ""}, GenerationOptions(beam_size=2))
    return [*rows, ["answer", answer["<ans>"], "", ""]]


@example
def repetition(page: Json) -> Rows:
    beams = Beams(1, 1, 3, VOCABULARY.bos, VOCABULARY.eos)
    beams.start(0)
    beams.tokens[0, 0, :, ID], beams.last[0] = [1, 0, 0], 2
    rows = []
    for name, window in {"none": None, "2": 2}.items():
        logits = torch.tensor([[2.0, -1.0, 0.5]])
        ids = torch.from_numpy(beams.recent_ids(np.array([0]), window)[0].astype(np.int64))
        penalize_repetition_(logits, ids, 1.25)
        rows.append([name, numbers(logits[0].tolist())])
    return rows
