"""Section 10: generation."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

import cpm_bee.generate.beam_search as beam_module
from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import (
    FinishedHypotheses,
    GenerationOptions,
    Generator,
    penalize_repetition,
)
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.network import CPMBee
from cpm_bee.segments import outline
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


class _ChainDecoder:
    """Stands for a model whose next token depends on the last one alone."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def pair(self, candidate: int) -> tuple[int, int]:
        return candidate, 0

    def logits(self, beams: Any, parents: Any) -> torch.Tensor:
        result = torch.full((len(beams), len(VOCABULARY)), float("-inf"))
        for row, tokens in zip(result, beams, strict=True):
            for token, p in CHAIN[VOCABULARY.tokens[tokens[-1].id]].items():
                row[VOCABULARY.ids[token]] = np.log(p)
        return result


@example
def beam_scores(page: Json) -> Rows:
    rows: Rows = []

    class Recording(FinishedHypotheses):
        def add(self, score: float, tokens: Any) -> None:
            text = " ".join(VOCABULARY.tokens[t.id] for t in tokens[1:])
            rows.append(["finished", f"{text} </s>", number(score * len(tokens)), number(score)])
            super().add(score, tokens)

        def cannot_improve(self, best_log_p: float, step: int) -> bool:
            stops = super().cannot_improve(best_log_p, step)
            if stops:
                rows.append(["stop", f"step {step}", number(best_log_p), number(best_log_p / step)])
            return stops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_module, "Decoder", _ChainDecoder)
        patch.setattr(beam_module, "FinishedHypotheses", Recording)
        generator = Generator(cast(CPMBee, torch.nn.Identity()), VOCABULARY)
        answer = generator.generate({"<ans>": ""}, GenerationOptions(beam_size=2))
    return [*rows, ["answer", answer["<ans>"], "", ""]]


@example
def repetition(page: Json) -> Rows:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    ids = torch.tensor([[1, 0, 0]])
    windows = {"none": None, "2": 2}
    return [
        [name, numbers(penalize_repetition(logits, ids, 1.25, window)[0].tolist())]
        for name, window in windows.items()
    ]
