"""Records that are generated together have the answers that each has alone."""

import json
import random

import numpy as np
import pytest
import torch
from generation_support import (
    GOLDEN,
    SHARED,
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

from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.candidates import GROUP, best_of_rows
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer

# From one record at a time to all at once, with all kinds of refilling between them.
BUDGETS = [1, 40, 80, 160, 10_000]


def assert_same_scores(one, other):
    """What a record sees of others, or a beam of other beams, changes at least the scores."""
    for a, b in zip(one, other, strict=True):
        if a.job is not None:
            scores = ([score for score, *_ in o.job.finished.hypotheses] for o in (a, b))
            assert next(scores) == pytest.approx(next(scores), rel=1e-6)


some_records = st.lists(records_of_any_kind, min_size=2, max_size=7)
# A near tie could be decided by rounding, so fuzzing has the same examples.
quick = examples(40, HealthCheck.function_scoped_fixture, derandomize=True)


@pytest.mark.slow
@quick
@given(st.integers(0, 2), some_records, options_of_any_kind, st.sampled_from(BUDGETS))
def test_a_batch_equals_one_by_one(tiny_models, tiny_tokenizer, which, records, options, budget):
    """Models in double precision: products of other shapes differ by less than a float32 shows."""
    generator = Generator(tiny_models[which], tiny_tokenizer)
    alone = [output for r in records for output in generator.search([r], options)]
    together = list(generator.search(records, options, budget))
    assert [o.filled() for o in together] == [o.filled() for o in alone]
    assert_same_scores(together, alone)
    backwards = list(generator.search(records[::-1], options, budget))
    assert [o.filled() for o in backwards] == [o.filled() for o in alone[::-1]]


@pytest.mark.slow
@quick
@given(records_of_any_kind, options_of_any_kind)
def test_equal_scores_are_decided_by_beam_and_token(tiny_model, tiny_tokenizer, record, options):
    """Each token has a twin with the same embedding, so each score exists twice."""
    model = CPMBee(tiny_model.config).double()
    model.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        twins = model.input_embedding.weight[::2]
        model.input_embedding.weight[1::2] = twins[: len(tiny_tokenizer) // 2]
    expected = SlowSearch(model, tiny_tokenizer, record, options).run()
    records = [record, {"input": "甲乙", "<ans>": ""}, record]
    results = list(Generator(model, tiny_tokenizer).stream(records, options))
    assert results[0] == results[2] == expected


@needs_shared
@pytest.mark.parametrize(
    ("name", "budget"),
    [("generation", 70), *(("trained_generation", budget) for budget in (1, 150, None))],
)
def test_golden_results_in_batches(name, budget):
    """In float32, in random orders."""
    if name == "generation":
        seed = json.loads((GOLDEN / "generation_seed.json").read_text())["weights_seed"]
        model = model_by_recipe(ModelConfig.load(GOLDEN / "model_config.json"), seed)
    else:
        model = trained_model()
    generator = Generator(model, Tokenizer.load(SHARED / "vocab" / "bee.txt"))
    cases = golden_lines(f"{name}.jsonl")
    random.Random(budget).shuffle(cases)
    by_options: dict[str, list] = {}
    for case in cases:
        by_options.setdefault(json.dumps(case["args"], sort_keys=True), []).append(case)
    for args, group in by_options.items():
        options = GenerationOptions(**json.loads(args))
        results = generator.stream([case["prompt"] for case in group], options, budget)
        assert list(map(unmarked, results)) == [case["result"] for case in group]


def jobs_of(search, tokenizer, records):
    encoder = Encoder(tokenizer)
    return [search.add(Prompt.of(record, encoder)) for record in records]


@pytest.mark.parametrize("budget", BUDGETS)
def test_records_may_come_and_go_while_others_run(tiny_model, tiny_tokenizer, budget):
    options = GenerationOptions(beam_size=2, max_length=8)
    inputs = ["甲𠮷乙", "甲" * 9, "<option_1>", "野甲" * 3, "乙<option_0><option_2>", "甲" * 8] * 2
    records = [{"input": text, "<ans>": {"x": "", "y": ""}} for text in inputs]
    generator = Generator(tiny_model, tiny_tokenizer)
    alone = [output for r in records for output in generator.search([r], options)]
    search = BeamSearch(Decoder(tiny_model, tiny_tokenizer), options, budget)
    jobs, ended = [], []
    for number in range(1000):
        if number % 2 == 0 and len(jobs) < len(records):  # one arrives in every other step
            jobs += jobs_of(search, tiny_tokenizer, [records[len(jobs)]])
        if number in (3, 12):
            search.cancel(jobs[number // 3])
        ended += search.step()
        if search.is_idle and len(jobs) == len(records):
            break
    kept = [i for i in range(len(records)) if i not in (1, 4)]
    assert set(ended) == {jobs[i] for i in kept}
    together = [alone[i]._replace(job=jobs[i]) for i in kept]
    assert [o.filled() for o in together] == [alone[i].filled() for i in kept]
    assert_same_scores(together, [alone[i] for i in kept])
    assert not jobs[1].has_ended and not jobs[4].has_ended


def test_a_generator_may_be_used_while_it_streams(tiny_model, tiny_tokenizer):
    options = GenerationOptions(beam_size=2, max_length=4)
    records = [{"input": text, "<ans>": ""} for text in ("甲", "乙乙", "甲ab甲")]
    generator = Generator(tiny_model, tiny_tokenizer)
    alone = [generator.generate(record, options) for record in records]
    stream = generator.stream(records, options, max_tokens=1)
    between = [(next(stream), generator.generate(record, options)) for record in records]
    assert between == list(zip(alone, alone, strict=True))


def test_slots_are_refilled_at_once(tiny_model, tiny_tokenizer):
    """With room for two records of three, the third one starts in the step after an end."""
    options = GenerationOptions(beam_size=1, max_length=4)
    record = {"input": "甲乙", "<ans>": ""}
    search = BeamSearch(Decoder(tiny_model, tiny_tokenizer), options, 1)
    search = BeamSearch(
        Decoder(tiny_model, tiny_tokenizer),
        options,
        2 * search.num_tokens(Prompt.of(record, Encoder(tiny_tokenizer))),
    )
    jobs_of(search, tiny_tokenizer, [record] * 3)
    ended = []
    while not ended:
        ended = search.step()
        assert search.num_waiting == 1
    search.step()
    assert len(ended) == 2 and search.num_waiting == 0


def test_the_cache_is_allocated_once(tiny_model, tiny_tokenizer, monkeypatch):
    """Records of other lengths and numbers use the memory that is there."""
    from cpm_bee.generate.kv_cache import SlotCache

    sizes = []
    original = SlotCache._zeros
    monkeypatch.setattr(SlotCache, "_zeros", lambda c, s: sizes.append(s) or original(c, s))
    rng = random.Random(0)
    records = [{"input": "甲" * rng.randrange(40), "<ans>": ""} for _ in range(40)]
    options = GenerationOptions(beam_size=2, max_length=3)
    generator = Generator(tiny_model, tiny_tokenizer)
    for _ in range(2):
        list(generator.stream(records, options, 300))
        generator.generate(records[0], options)
    layers = 3
    assert len(sizes) == 2 * layers
    heads = tiny_model.config.num_heads
    assert sizes[0][0] <= 300 * heads


@given(st.integers(1, 70), st.integers(1, 3), st.randoms(use_true_random=False))
def test_best_of_rows_is_a_stable_sort(k, num_groups, rng):
    """Few different values, so that there are ties within and between groups."""
    size = max(num_groups, -(-k // GROUP)) * GROUP
    values = [rng.choice([-1.0, 0.0, -0.0, 2.5, float("-inf")]) for _ in range(2 * size)]
    logits = torch.tensor(values).view(2, size)
    logits[:, 0] = 1.0  # not all are -inf
    found = best_of_rows(logits, k)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :k]
    assert found.numbers.tolist() == order.tolist()
    expected = logits.double().log_softmax(dim=1).gather(1, found.numbers)
    torch.testing.assert_close(found.log_p.double(), expected, atol=1e-5, rtol=0)
