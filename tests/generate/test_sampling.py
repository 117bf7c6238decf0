"""Sampling: what may be drawn, how often, and on what it depends."""

import math

import numpy as np
import pytest
import torch
from generation_support import unmarked
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.errors import InputError
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.sampling import sample

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]])
P = LOGITS.softmax(dim=1)[0].tolist()


def options(**values):
    return GenerationOptions(**{"temperature": 1.0, **values})


def drawn(count=4000, logits=LOGITS, **values):
    """How often each token is drawn by evenly spaced numbers."""
    uniforms = ((np.arange(count) + 0.5) / count)[None]
    log_p, numbers = sample(logits, [options(**values)], uniforms)
    assert log_p.shape == numbers.shape == (1, count)
    return np.bincount(numbers[0].numpy(), minlength=logits.shape[1]) / count


def test_tokens_are_drawn_as_often_as_they_are_probable():
    assert drawn() == pytest.approx(P, abs=1 / 4000)


def test_temperature_flattens_or_sharpens():
    for temperature in (0.5, 2.0):
        expected = (LOGITS / temperature).softmax(dim=1)[0].tolist()
        assert drawn(temperature=temperature) == pytest.approx(expected, abs=1 / 4000)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 2}, 2),
        ({"top_k": 100}, 4),
        ({"top_p": P[0] - 0.01}, 1),
        ({"top_p": P[0] + 0.01}, 2),
        ({"top_p": 1.0}, 4),
        ({"min_p": P[1] / P[0] * 0.99}, 2),
        ({"min_p": P[1] / P[0] * 1.01}, 1),
        ({"min_p": 0.0}, 4),
        # Among the two best ones, the first has a larger share.
        ({"top_k": 2, "top_p": P[0] / (P[0] + P[1]) - 0.01}, 1),
    ],
)
def test_filters_leave_the_most_probable_tokens_in_proportion(values, kept):
    expected = np.array([*P[:kept], *[0] * (5 - kept)]) / sum(P[:kept])
    assert drawn(**values) == pytest.approx(expected.tolist(), abs=1 / 4000)


@examples(50)
@given(
    st.lists(st.floats(-8, 8), min_size=3, max_size=3000),
    st.floats(0.05, 1),
    st.integers(0, 2**32 - 1),
)
def test_top_p_keeps_the_least_set_with_that_share(values, top_p, seed):
    logits = torch.tensor([values], dtype=torch.float32)
    uniforms = np.random.default_rng(seed).random((1, 200))
    _, numbers = sample(logits, [options(top_p=top_p)], uniforms)
    p = logits.double().softmax(dim=1)[0]
    for number in set(numbers[0].tolist()):
        # Those that are more probable have less than `top_p` together; 1e-6 is fp32's rounding.
        assert p[p > p[number] * (1 + 1e-5)].sum() < top_p + 1e-6


def test_rows_have_their_own_options_and_the_models_log_probability():
    logits = LOGITS.expand(20, -1)
    rows = [options(temperature=0.1 + i / 4, top_k=1 + i % 4) for i in range(20)]
    uniforms = np.full((20, 3), 0.999)
    log_p, numbers = sample(logits, rows, uniforms)
    for row, own in enumerate(rows):
        alone = sample(LOGITS, [own], uniforms[:1])
        assert torch.equal(numbers[row], alone[1][0])
        assert numbers[row].max() < own.top_k
    assert torch.equal(log_p, logits.log_softmax(dim=1).gather(1, numbers))


def test_samples_depend_on_the_seed_and_the_number_alone(tiny_models, tiny_tokenizer):
    generator = Generator(tiny_models[0], tiny_tokenizer)
    records = [{"input": "甲" * n, "<ans>": ""} for n in (1, 5, 3, 3, 2)]
    own = options(max_length=6, num_return=3)
    together = list(generator.stream(records, own))
    assert list(generator.stream(records, own, 1)) == together  # one at a time
    assert list(generator.stream(records[2:], own, numbers=range(2, 5))) == together[2:]
    other = list(generator.stream(records, options(max_length=6, num_return=3, seed=1)))
    assert other != together
    assert unmarked(together[2]) != together[2]
    for result in together:
        scores = [candidate["score"] for candidate in result["<candidates>"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        assert result["<candidates>"][0]["<ans>"] == result["<ans>"]


def test_temperature_zero_is_greedy(tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    record = {"input": "甲乙", "<ans>": ""}
    greedy = generator.generate(record, GenerationOptions(beam_size=1, max_length=5))
    assert generator.generate(record, options(temperature=0, max_length=5)) == greedy
    cold = options(temperature=1e-4, max_length=5)
    assert generator.generate(record, cold) == greedy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 3, "temperature": None}, "--top-k: needs --temperature"),
        ({"top_p": 0.5, "temperature": 0}, "--top-p: needs --temperature"),
        ({"beam_size": 2}, "--beam-size: not used with --temperature"),
        ({"num_return": 4, "temperature": None, "beam_size": 3}, "--num-return 4: needs"),
        ({"num_return": 2, "temperature": 0}, "--num-return 2: needs"),
        ({"top_p": 1.5}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        options(**values)
