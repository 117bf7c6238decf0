import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tiny import TOKENIZER, make_model, records

from cpm_bee.encoding import Encoder
from cpm_bee.generate.scoring import groups_by_length, is_writable, score_records

MODEL = make_model()
ENCODER = Encoder(TOKENIZER)


def score(items, max_tokens=10_000):
    return score_records(MODEL, ENCODER, items, max_tokens=max_tokens)


@examples(20)
@given(st.lists(records(), min_size=1, max_size=5), st.integers(1, 60))
def test_a_record_has_the_same_scores_in_any_company(items, max_tokens):
    together = score(items, max_tokens)
    for i, record in enumerate(items):
        alone = score([record])
        assert together.targets[i] == alone.targets[0]
        # Two sums of at most a few hundred products in another order.
        assert together.losses[i] == pytest.approx(alone.losses[0], rel=1e-4, abs=1e-4)


def test_the_loss_is_that_of_the_model():
    record = {"input": "春天", "<ans>": "风 ab"}
    batch_loss = score([record]).losses[0]
    from cpm_bee.data.batch import collate

    with torch.no_grad():
        expected = MODEL.loss(collate([ENCODER.encode(record)], TOKENIZER)).item()
    assert batch_loss == pytest.approx(expected, rel=1e-6)


def test_an_answer_that_generation_cannot_write_is_never_exact():
    assert not is_writable({"input": "a", "<ans>": "漢"}, ENCODER)
    assert is_writable({"input": "漢", "<ans>": "漢"}, ENCODER)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 80))
def test_groups_hold_each_number_once_within_the_limit(lengths, max_tokens):
    groups = list(groups_by_length(lengths, max_tokens))
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[n] for n in group) <= max_tokens
    ordered = [lengths[n] for group in groups for n in group]
    assert ordered == sorted(lengths, reverse=True)


def test_no_records():
    assert score([]).losses.shape == (0,)
    assert np.array_equal(score([]).is_exact, np.zeros(0, dtype=bool))
