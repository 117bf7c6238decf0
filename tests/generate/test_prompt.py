import pytest

from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.generate.prompt import Prompt, fill_answers


def prompt_of(record, tokenizer):
    return Prompt.of(record, Encoder(tokenizer))


def test_answer_texts_are_no_part_of_the_prompt(tiny_tokenizer):
    empty = {"input": "甲", "<ans>": {"x": "", "y": {"x": ""}}}
    filled = {"input": "甲", "<ans>": {"x": "乙<option_9>", "y": {"x": "𠮷"}}}
    a, b = prompt_of(empty, tiny_tokenizer), prompt_of(filled, tiny_tokenizer)
    assert a.encoded.ids.tolist() == b.encoded.ids.tolist()
    assert a.encoded.context.all()
    assert a.answers == b.answers == (5, 8)  # root input 甲 <ans> x . y x .
    assert not b.has_unknown
    assert set(a.encoded.segments.tolist()) == {0, 1, 2, 3, 4, 6, 7}


def test_extension_entries_have_the_records_own_text(tiny_tokenizer):
    t = tiny_tokenizer
    record = {"input": "𠮷甲<option_b>野<option_a>𠮷", "<ans>": {"<mask_0>": ""}}
    prompt = prompt_of(record, t)
    option, mask = t.ids["<option>"], t.ids["<mask>"]
    assert prompt.has_unknown
    pairs = [(t.unk, 0), (t.ids["甲"], 0), (option, 0), (t.unk, 1), (option, 1), (mask, 0)]
    assert prompt.text(pairs) == "𠮷甲<option_b>野<option_a><mask_0>"


def test_without_an_entry_a_token_has_its_ordinary_text(tiny_tokenizer):
    t = tiny_tokenizer
    prompt = prompt_of({"input": "甲", "<ans>": ""}, t)
    ids = [t.ids[token] for token in ("<option>", "<", "</n>", "</_>", "ab")]
    assert prompt.text([(i, 0) for i in ids]) == "<option><<\n ab"


def test_a_special_token_that_the_vocabulary_lacks_is_refused(tiny_tokenizer):
    with pytest.raises(InputError, match="<nonsense> is not in the vocabulary"):
        prompt_of({"input": "<nonsense_1>", "<ans>": ""}, tiny_tokenizer)


def test_fill_keeps_the_structure_and_the_record():
    record = {"<ans>": {"x": "", "y": {"x": "1", "z": {}}, "w": ""}, "input": {"<ans>": "kept"}}
    before = {"<ans>": {"x": "", "y": {"x": "1", "z": {}}, "w": ""}, "input": {"<ans>": "kept"}}
    filled = fill_answers(record, ["a", "b", None])
    assert filled == {
        "<ans>": {"x": "a", "y": {"x": "b", "z": {}}, "w": None},
        "input": {"<ans>": "kept"},
    }
    assert list(filled) == list(record)
    assert record == before
