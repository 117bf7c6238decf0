import math

import pytest

from cpm_bee.evaluate.classes import (
    OTHER,
    Confusion,
    are_labels,
    is_choice,
    macro_f1,
)
from cpm_bee.records import options_of

CHOICE = {
    "input": "问",
    "options": {"<option_0>": "甲", "<option_1>": "乙"},
    "question": "?",
    "<ans>": "<option_1>",
}
RIGHT = ["a", "a", "a", "b", "b", "c"]
GIVEN = ["a", "a", "b", "b", "x", "a"]


def test_options_of_a_record():
    assert options_of(CHOICE) == {"<option_0>": "甲", "<option_1>": "乙"}
    nested = {"task": {"what": CHOICE["options"]}, "<ans>": ""}
    assert options_of(nested) == CHOICE["options"]
    assert options_of({"input": "x", "<ans>": CHOICE["options"]}) == {}
    assert options_of({"options": {"<option_0>": "甲"}, "<ans>": ""}) == {}
    assert options_of({"options": {"<option_0>": "甲", "b": "乙"}, "<ans>": ""}) == {}


def test_choices_are_answered_with_an_option():
    assert is_choice(CHOICE)
    assert not is_choice({**CHOICE, "<ans>": "乙"})
    assert not is_choice({**CHOICE, "<ans>": {"a": "<option_1>"}})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["好", "坏"] * 10, True),
        (["好"] * 20, False),  # one class
        ([f"{i}" for i in range(20)], False),
        (["好", "坏"] * 4, False),  # too few records to tell
        ([f"{i % 31}" for i in range(1000)], False),
        ([], False),
    ],
)
def test_labels(answers, expected):
    assert are_labels(answers) is expected


def test_confusion_and_figures_of_each_class():
    confusion = Confusion(RIGHT, GIVEN)
    assert confusion.columns == ["a", "b", "c", OTHER]
    assert confusion.counts == {
        ("a", "a"): 2, ("a", "b"): 1, ("b", "b"): 1, ("b", OTHER): 1, ("c", "a"): 1,
    }  # fmt: skip
    a, b, c = confusion.figures()
    assert a == ("a", 2 / 3, 2 / 3, pytest.approx(2 / 3), 3)
    assert b == ("b", 1 / 2, 1 / 2, 1 / 2, 2)
    assert c == ("c", 0, 0, 0, 1)


def test_macro_f1_is_the_mean_of_the_classes():
    statistics = macro_f1([*RIGHT, None], [*GIVEN, None])
    assert statistics.figure == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert statistics.counted == 6
    assert math.isnan(macro_f1([None], [None]).figure)


def test_macro_f1_of_a_sample_without_a_class_leaves_it_out():
    statistics = macro_f1(RIGHT, GIVEN)
    assert statistics.value(statistics.rows[:2].sum(axis=0)) == 1
