"""Few-shot examples: what generation, scoring and choosing make of in-context samples."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from generation_support import SlowSearch, unmarked
from support import RunScript

from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.generate.choices import choose
from cpm_bee.generate.examples import example_settings, read_examples
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.scoring import score_records
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

EXAMPLES: list[Record] = [
    {"input": "甲𠮷", "options": {"<option_1>": "乙", "<option_2>": "ab"}, "<ans>": "<option_2>"},
    {"question": "x", "<ans>": {"y": "甲乙", "x": {"ab": "丙"}}},
]
RECORDS: list[Record] = [
    {"input": "乙", "options": {"<option_0>": "甲", "<option_1>": "丙"}, "<ans>": ""},
    {"input": "xx", "<ans>": {"x": "", "y": {"y": "", "x": ""}}},
    {"<ans>": ""},
]


@pytest.mark.parametrize("number", range(3))
def test_answers_are_those_of_a_search_without_a_cache(
    tiny_models: list[CPMBee], tiny_tokenizer: Tokenizer, number: int
) -> None:
    model = tiny_models[number]
    options = GenerationOptions(beam_size=2, num_return=2, max_length=3)
    found = list(Generator(model, tiny_tokenizer, EXAMPLES).stream(RECORDS, options))
    alone = list(Generator(model, tiny_tokenizer).stream(RECORDS, options))
    for record, result in zip(RECORDS, found, strict=True):
        assert result == SlowSearch(model, tiny_tokenizer, record, options, EXAMPLES).run()
    assert found != alone  # at least in their scores


def test_scores_tell_what_generation_writes(
    tiny_models: list[CPMBee], tiny_tokenizer: Tokenizer
) -> None:
    greedy = GenerationOptions(beam_size=1, max_length=6)
    for model in tiny_models:
        generator = Generator(model, tiny_tokenizer, EXAMPLES)
        answered: list[Record] = [
            {**RECORDS[0], "<ans>": answer} for answer in ("<option_0>", "甲", "𠮷", "丙丙")
        ]
        scores = score_records(model, generator.encoder, answered, max_tokens=50)
        [written] = generator.stream(RECORDS[:1], greedy)
        expected = [unmarked(written) == one for one in answered]
        assert scores.is_exact.tolist() == expected
        # The best of them by the model's own account, whether or not the search has written it.
        options = GenerationOptions(beam_size=4, num_return=4, max_length=6)
        [found] = generator.stream(RECORDS[:1], options)
        for candidate in found["<candidates>"]:
            whole = {**RECORDS[0], "<ans>": candidate["<ans>"]}
            if "<s>" not in candidate["<ans>"] and "<cut>" not in found:
                [loss], [count] = score_records(model, generator.encoder, [whole], max_tokens=50)[
                    :2
                ]
                assert candidate["score"] == pytest.approx(-loss / count, rel=1e-6)


def test_choices_are_the_softmax_of_the_scores(
    tiny_model: CPMBee, tiny_tokenizer: Tokenizer
) -> None:
    generator = Generator(tiny_model, tiny_tokenizer, EXAMPLES)
    record = RECORDS[0]
    [choice] = choose(tiny_model, generator.encoder, [record], max_tokens=100)
    assert choice is not None
    answered: list[Record] = [{**record, "<ans>": option} for option in choice.probabilities]
    losses = score_records(tiny_model, generator.encoder, answered, max_tokens=100).losses
    p = np.exp(losses.min() - losses)
    assert list(choice.probabilities.values()) == pytest.approx((p / p.sum()).tolist(), rel=1e-6)


def test_the_order_of_examples_decides_nothing(
    tiny_model: CPMBee, tiny_tokenizer: Tokenizer
) -> None:
    plain: list[Record] = [{"input": "甲", "<ans>": "乙"}, {"input": "ab x", "<ans>": "甲乙"}]
    losses = [
        score_records(
            tiny_model,
            Generator(tiny_model, tiny_tokenizer, order).encoder,
            [{"input": "x", "<ans>": "丙"}],
            max_tokens=100,
        ).losses[0]
        for order in (plain, plain[::-1], plain[:1])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_too_many_fields_are_told(tiny_tokenizer: Tokenizer) -> None:
    many: Record = {"a": {str(i): "x" for i in range(1100)}, "<ans>": "x"}
    with pytest.raises(InputError, match="the record and its examples have 4,413 fields"):
        Prompt.of({"input": "x", "<ans>": ""}, Encoder(tiny_tokenizer, [many] * 2))


def test_examples_that_cannot_serve(tmp_path: Path, run_script: RunScript) -> None:
    assert read_examples(None) == [] and example_settings(None) == {}
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "a", "<ans>": ""}\n{"<ans>": "b"}\n{"<ans>": {"x": ""}}\n')
    with pytest.raises(InputError, match=re.escape(f"{path}:3: has no answer")) as caught:
        read_examples(str(path))
    assert f"{path}:1: has no answer" in str(caught.value)
    path.write_text('{"input": "a < b", "<ans>": "b"}\n')
    assert read_examples(str(path), escape=True) == [{"input": "a << b", "<ans>": "b"}]
    before = example_settings(str(path))
    path.write_text('{"input": "a", "<ans>": "b"}\n')
    assert example_settings(str(path)) != before  # --resume is refused
    source = tmp_path / "in.jsonl"
    source.write_text('{"<ans>": ""}\n')
    flags = ["--input", source, "--output", tmp_path / "out", "--examples", tmp_path / "none"]
    done = run_script("src/text_generation.py", *flags)
    assert done.returncode == 2 and "--examples" in done.stderr and "no such file" in done.stderr
