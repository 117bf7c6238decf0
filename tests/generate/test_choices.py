from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tiny import TOKENIZER, make_model

from cpm_bee.encoding import Encoder
from cpm_bee.generate.choices import choose, has_choices
from cpm_bee.generate.scoring import score_records

MODEL = make_model()
ENCODER = Encoder(TOKENIZER)
TEXTS = ["春 天", "风", "ab x", "a"]


def record(texts, **fields):
    options = {f"<option_{i}>": text for i, text in enumerate(texts)}
    # With an unknown character, <unk> is a candidate in generation too, as in `score_records`.
    return {"input": "春天漢", **fields, "options": options, "<ans>": ""}


def choices(records, **kwargs):
    return choose(MODEL, ENCODER, records, max_tokens=500, **kwargs)


def test_the_probabilities_are_those_of_the_answers():
    own = record(TEXTS)
    answered = [{**own, "<ans>": option} for option in own["options"]]
    losses = score_records(MODEL, ENCODER, answered, max_tokens=1).losses
    expected = np.exp(-losses) / np.exp(-losses).sum()
    (choice,) = choices([own])
    assert list(choice.probabilities) == list(own["options"])
    assert list(choice.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert choice.best == list(own["options"])[int(expected.argmax())]


@examples(10)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_records_do_not_affect_each_other(sizes):
    items = [record(TEXTS[:size]) if size > 1 else {"input": "a", "<ans>": ""} for size in sizes]
    for item, together in zip(items, choices(items), strict=True):
        (alone,) = choices([item])
        if alone is None:
            assert together is None
            continue
        assert sum(together.probabilities.values()) == pytest.approx(1)
        assert together.probabilities == pytest.approx(alone.probabilities, rel=1e-4)


def test_all_orders_together_do_not_depend_on_the_order_of_the_record():
    found = []
    for texts in permutations(TEXTS[:3]):
        own = record(texts)
        (choice,) = choices([own], orders=6)
        found.append({own["options"][o]: p for o, p in choice.probabilities.items()})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
    one_order = [choices([record(t)])[0].probabilities["<option_0>"] for t in permutations(TEXTS)]
    # The order does matter to this model, by more than rounding.
    assert np.ptp(one_order) > 1e-3


def test_no_more_orders_than_there_are():
    own = record(TEXTS[:2])
    (two,), (many,) = choices([own], orders=2), choices([own], orders=100)
    assert two.probabilities == pytest.approx(many.probabilities)


def test_a_nested_list_of_options_is_found_and_reordered():
    own = {"task": {"of": {"<option_0>": "a", "<option_1>": "b"}}, "<ans>": ""}
    (choice,) = choices([own], orders=2)
    swapped = {"task": {"of": {"<option_0>": "b", "<option_1>": "a"}}, "<ans>": ""}
    (other,) = choices([swapped], orders=2)
    assert choice.probabilities["<option_0>"] == pytest.approx(
        other.probabilities["<option_1>"], rel=1e-4
    )


def test_a_record_with_several_answers_has_no_choices():
    several = {**record(TEXTS), "<ans>": {"x": "", "y": ""}}
    plain = {"input": "a", "<ans>": ""}
    assert [has_choices(own) for own in (record(TEXTS), several, plain)] == [True, False, False]
    choice, *others = choices([record(TEXTS), several, plain])
    assert sum(choice.probabilities.values()) == pytest.approx(1) and others == [None, None]
