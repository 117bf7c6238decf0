import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.near_duplicates import THRESHOLD, NearDuplicates, between

CHARACTERS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会"


def record(text, answer=""):
    return {"input": text, "<ans>": answer}


def sentence(rng, length=60):
    return "".join(rng.choices(CHARACTERS, k=length))


def test_spaces_punctuation_case_and_answers_do_not_count():
    a = record("Hello, World! 今天天气很好。", "x")
    b = record("hello world  今天，天气很好", "y")
    assert between([a], [record("something else"), b]) == [(0, 1, 1.0)]


def test_one_changed_character_in_a_hundred_is_a_near_duplicate():
    rng = random.Random(0)
    missed = 0
    for _ in range(200):
        text = sentence(rng, 100)
        place = rng.randrange(100)
        changed = text[:place] + "Ω" + text[place + 1 :]
        missed += not between([record(changed)], [record(text)])
    # 5 of at most 96 grams differ: a similarity of at least 91 / 101 = 0.9 finds a band in all but
    # (1 - 0.9 ** 5) ** 20 = 1.3e-8 of the pairs.
    assert missed == 0


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_a_named_pair_is_one(seed, changes):
    rng = random.Random(seed)
    text = list(sentence(rng))
    for _ in range(changes):
        text[rng.randrange(60)] = rng.choice(CHARACTERS)
    index = NearDuplicates()
    index.add(record(sentence(random.Random(seed))))
    for number, similarity in index.find(record("".join(text))):
        assert number == 0
        assert similarity >= THRESHOLD


def test_different_texts_are_not_near_duplicates():
    rng = random.Random(1)
    records = [record(sentence(rng)) for _ in range(300)]
    assert between(records[:150], records[150:]) == []


def test_the_most_similar_one_is_named():
    text = sentence(random.Random(2), 200)
    near, same = record(text[:-6]), record(text)
    assert between([record(text)], [near, same])[0].other == 1


@pytest.mark.parametrize("text", ["", "好", "。。。", "一二三四"])
def test_short_texts_are_compared_whole(text):
    assert between([record(text)], [record(text)])[0].similarity == 1
    assert not between([record(text)], [record("另一个")])


def test_nested_fields_count():
    a = {"options": {"<option_0>": "甲乙丙丁戊", "<option_1>": "己庚辛壬癸"}, "<ans>": "<option_0>"}
    b = {"options": {"<option_0>": "子丑寅卯辰", "<option_1>": "己庚辛壬癸"}, "<ans>": "<option_0>"}
    assert not between([a], [b])
    assert between([a], [dict(a, **{"<ans>": "<option_1>"})])
