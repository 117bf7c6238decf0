"""Beam search against the golden results and against a search without any cache."""

import json
import math

import numpy as np
import pytest
import torch
from generation_support import (
    GOLDEN,
    SHARED,
    Slow,
    SlowSearch,
    golden_lines,
    model_by_recipe,
    needs_shared,
    options_of_any_kind,
    records_of_any_kind,
    trained_model,
    unmarked,
)
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from properties import examples

from cpm_bee import delta
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, RunError
from cpm_bee.generate.beam_search import penalize_repetition_
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.job import FinishedHypotheses
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bee_tokenizer():
    return Tokenizer.load(SHARED / "vocab" / "bee.txt")


def assert_same_results(model, tokenizer, cases):
    assert cases
    generator = Generator(model, tokenizer)
    for case in cases:
        options = GenerationOptions(**case["args"])
        assert unmarked(generator.generate(case["prompt"], options)) == case["result"]


@needs_shared
def test_golden_generation(bee_tokenizer):
    seed = json.loads((GOLDEN / "generation_seed.json").read_text())["weights_seed"]
    model = model_by_recipe(ModelConfig.load(GOLDEN / "model_config.json"), seed)
    assert_same_results(model, bee_tokenizer, golden_lines("generation.jsonl"))


@needs_shared
@pytest.mark.parametrize("name", ["trained_generation.jsonl", "trained_generation_batch.jsonl"])
def test_golden_generation_of_a_trained_model(bee_tokenizer, name):
    assert_same_results(trained_model(), bee_tokenizer, golden_lines(name))


# The same ones also for fuzzing: a near tie could be decided by rounding.
quick = examples(60, HealthCheck.function_scoped_fixture, derandomize=True)


@pytest.mark.slow
@quick
@given(st.integers(0, 2), records_of_any_kind, options_of_any_kind)
def test_cached_search_equals_search_from_scratch(
    tiny_models, tiny_tokenizer, which, record, options
):
    model = tiny_models[which]
    result = Generator(model, tiny_tokenizer).generate(record, options)
    assert result == SlowSearch(model, tiny_tokenizer, record, options).run()


@pytest.mark.slow
@quick
@given(st.integers(0, 2), records_of_any_kind)
def test_one_beam_is_greedy(tiny_models, tiny_tokenizer, which, record):
    model = tiny_models[which]
    options = GenerationOptions(beam_size=1, max_length=8)
    slow = SlowSearch(model, tiny_tokenizer, record, options)
    greedy, complete = Slow(0.0, ((),)), False
    for step in range(10):
        log_p = slow.log_probabilities(greedy)
        number = max(range(len(log_p)), key=lambda i: log_p[i])
        if step == 9 and number == tiny_tokenizer.eos:
            break  # an answer that would begin now has not been reached
        greedy, complete = slow.continued(greedy, number, 0.0)
        if complete:
            break
    prompt = Prompt.of(record, Encoder(tiny_tokenizer))
    written = [prompt.text(a) for a in greedy.answers]
    expected = fill_answers(record, written + [None] * (len(slow.leaves) - len(written)))
    assert unmarked(Generator(model, tiny_tokenizer).generate(record, options)) == expected


def test_record_is_kept_and_its_answer_ignored(tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    options = GenerationOptions(max_length=3)
    record = {"<ans>": {"x": "甲", "y": {}}, "input": {"x": "乙"}}
    result = unmarked(generator.generate(record, options))
    assert record == {"<ans>": {"x": "甲", "y": {}}, "input": {"x": "乙"}}
    assert list(result) == ["<ans>", "input"] and result["input"] == {"x": "乙"}
    assert isinstance(result["<ans>"]["x"], str) and result["<ans>"]["y"] == {}
    empty = {"<ans>": {"x": "", "y": {}}, "input": {"x": "乙"}}
    assert unmarked(generator.generate(empty, options)) == result


def test_a_record_without_answer_leaves_comes_back_as_it_is(tiny_model, tiny_tokenizer):
    record = {"input": "甲", "<ans>": {"x": {}}}
    generator = Generator(tiny_model, tiny_tokenizer)
    assert generator.generate(record, GenerationOptions()) == record


def test_finished_hypotheses_take_no_place_in_the_beam(tiny_model, tiny_tokenizer, monkeypatch):
    eos, original, widths = tiny_tokenizer.eos, Decoder.continuations, []

    def eager_to_end(decoder, states, slots, log_p, k, choose):
        def to_end(logits, before, part):
            logits[:, eos] = logits.amax(dim=1) + 0.1
            return choose(logits, before, part)

        widths.append((log_p > -math.inf).sum())
        return original(decoder, states, slots, log_p, k, to_end)

    monkeypatch.setattr(Decoder, "continuations", eager_to_end)
    options = GenerationOptions(beam_size=4, max_length=4)
    Generator(tiny_model, tiny_tokenizer).generate({"input": "甲", "<ans>": ""}, options)
    assert len(widths) > 1 and widths == [1] + [4] * (len(widths) - 1)


def test_more_beams_than_candidates(tiny_model, tiny_tokenizer):
    record = {"input": "甲", "<ans>": ""}
    options = GenerationOptions(beam_size=50, max_length=1)
    result = Generator(tiny_model, tiny_tokenizer).generate(record, options)
    assert result == SlowSearch(tiny_model, tiny_tokenizer, record, options).run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_delta_acts_whatever_the_type_of_the_base(tiny_tokenizer, tiny_model, dtype):
    record, options = {"input": "甲乙ab", "<ans>": ""}, GenerationOptions(max_length=4)
    model = CPMBee(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    before = Generator(model, tiny_tokenizer).generate(record, options)
    delta.insert(model.to(dtype), delta.DeltaConfig(rank=4), seed=0)
    generator = Generator(model, tiny_tokenizer)
    # In 16 bits a near tie may be decided otherwise: compare within the type.
    if dtype == torch.float32:
        assert generator.generate(record, options) == before
    unchanged = generator.generate(record, options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=3.0, generator=torch.Generator().manual_seed(1))
    assert generator.generate(record, options) != unchanged


# Parts


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"beam_size": 0}, "--beam-size: 0"),
        ({"max_length": 0}, "--max-length: 0"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: 0.0"),
        ({"repetition_penalty": math.nan}, "--repetition-penalty: nan"),
        ({"repetition_window": 0}, "--repetition-window: 0"),
    ],
)
def test_options_out_of_range_are_refused(values, flag):
    with pytest.raises(InputError, match=flag):
        GenerationOptions(**values)


def test_broken_weights_are_reported(tiny_tokenizer, tiny_model):
    model = CPMBee(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    model.encoder.output_layernorm.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match="logits are not finite"):
        Generator(model, tiny_tokenizer).generate({"<ans>": ""}, GenerationOptions())


def test_penalty_is_applied_once_an_id():
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.0, -1.0]])
    penalize_repetition_(logits, torch.tensor([[4, 2, 1, 1]]), 2.0)
    assert logits.tolist() == [[2.0, -4.0, 2.0, 0.0, -2.0]]


def test_finished_keeps_the_best_and_knows_when_to_stop():
    finished, (first, second, third) = FinishedHypotheses(2), np.zeros((3, 1, 5), dtype=np.int32)
    finished.add(-1.0, first)
    assert not finished.cannot_improve(-100.0, 1)
    finished.add(-3.0, third)
    finished.add(-1.0, second)  # equal to the first
    assert [hypothesis.tokens is first for hypothesis in finished.hypotheses] == [True, False]
    assert finished.cannot_improve(-4.0, 4)
    assert not finished.cannot_improve(-3.9, 4)
