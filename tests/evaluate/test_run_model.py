"""What evaluation makes the model do: how much at once, and what if its logits are not finite."""

import math

import numpy as np
import pytest
import torch
from tiny import TOKENIZER, make_model

from cpm_bee.data.record_source import LocatedRecord
from cpm_bee.encoding import Encoder
from cpm_bee.errors import RunError
from cpm_bee.evaluate import run
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.choices import choose
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.loaded_model import LoadedModel
from cpm_bee.generate.scoring import score_records

OPTIONS = {"<option_0>": "a", "<option_1>": "春"}
RECORDS = [{"input": "春天" * n, "options": OPTIONS, "<ans>": "<option_1>"} for n in (1, 2, 3, 4)]
LOCATED = [LocatedRecord(f"f:{i}", own, own, {}) for i, own in enumerate(RECORDS, start=1)]


class Base:
    """As much of a pretrained model as evaluation needs."""

    def __init__(self, model):
        self.model, self.tokenizer = model, TOKENIZER


def outcome(monkeypatch, max_tokens):
    """(the outcome, records in each batch that was scored, chosen; room for tokens of a search)"""
    model = make_model()
    scored, chosen, room = [], [], []
    score, prefill, init = model.score, Decoder.prefill, BeamSearch.__init__

    def spy_score(batch):
        scored.append(len(batch.lengths))
        return score(batch)

    def spy_prefill(self, prompts, slots):
        chosen.append(len(prompts))
        return prefill(self, prompts, slots)

    def spy_init(self, decoder, options, room_for):
        room.append(room_for)
        init(self, decoder, options, room_for)

    monkeypatch.setattr(model, "score", spy_score)
    monkeypatch.setattr(Decoder, "prefill", spy_prefill)
    monkeypatch.setattr(BeamSearch, "__init__", spy_init)
    options = EvaluateOptions(dataset="x", max_length=4, max_tokens=max_tokens)
    made = run.run_model(LoadedModel(Base(model), torch.device("cpu")), LOCATED, options)
    return made, scored, chosen, room


def test_max_tokens_bounds_scoring_choosing_and_answering(monkeypatch):
    together, *at_once = outcome(monkeypatch, None)
    assert at_once[0] == [4] and at_once[1][0] == 4 and at_once[2][0] > 1
    monkeypatch.undo()
    alone, scored, chosen, room = outcome(monkeypatch, 1)
    assert scored == [1] * 4 and chosen == [1] * 8 and room == [1]
    assert alone.answers == together.answers and alone.choices == together.choices
    np.testing.assert_allclose(alone.scores.losses, together.scores.losses, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_of_the_checkpoint(value):
    model, encoder = make_model(), Encoder(TOKENIZER)
    with torch.no_grad():
        model.encoder.output_layernorm.weight.fill_(value)
    for work in (score_records, choose):
        with pytest.raises(RunError, match="the model's logits are not finite: the weights"):
            work(model, encoder, RECORDS, max_tokens=100)
