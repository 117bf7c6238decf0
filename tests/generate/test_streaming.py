"""Texts of answers that grow while a record is generated, exact limits, and cancelled jobs."""

import numpy as np
import pytest
from generation_support import options_of_any_kind, records_of_any_kind
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from properties import examples
from tiny import TOKENIZER, make_model

from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.generator import Generator, growth
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt

samples_of_any_kind = st.builds(
    GenerationOptions,
    temperature=st.sampled_from([0.7, 1.5]),
    num_return=st.integers(1, 3),
    max_length=st.integers(1, 6),
    seed=st.integers(0, 9),
)
quick = examples(25, HealthCheck.function_scoped_fixture, derandomize=True)


def leaves(answer):
    if isinstance(answer, dict):
        return [leaf for value in answer.values() for leaf in leaves(value)]
    return [answer]


@pytest.mark.slow
@quick
@given(
    st.integers(0, 2),
    st.lists(records_of_any_kind, min_size=1, max_size=4),
    options_of_any_kind | samples_of_any_kind,
)
def test_texts_grow_to_the_answers(tiny_models, tiny_tokenizer, which, records, options):
    """Whatever is shown once stays, and the answers are those without a listener."""
    seen: dict[int, list] = {}
    generator = Generator(tiny_models[which], tiny_tokenizer)
    outputs = generator.search(
        records,
        options,
        200,
        on_texts=lambda output, texts: seen.setdefault(id(output.job), []).append(list(texts)),
    )
    outputs = list(outputs)
    for output in outputs:
        shown = seen.pop(id(output.job), []) if output.job else []
        joined = [""] * len(output.prompt.answers)
        for before, after in zip([[], *shown], shown, strict=False):
            for answer, text in growth(before, after):  # it asserts that nothing is taken back
                joined[answer] += text
        written = leaves(output.filled()["<ans>"]) if output.job else []
        assert joined == [text or "" for text in written]
    assert not seen
    plain = generator.search(records, options, 200)
    assert [o.filled() for o in outputs] == [o.filled() for o in plain]


@pytest.mark.parametrize("options", [{"beam_size": 1}, {"temperature": 1.0}])
def test_one_beam_shows_each_token_at_once(tiny_model, tiny_tokenizer, options):
    options = GenerationOptions(max_length=12, **options)
    record = {"input": "甲𠮷<option_3>", "<ans>": ""}
    search = BeamSearch(Decoder(tiny_model, tiny_tokenizer), options, 1)
    job = search.add(Prompt.of(record, Encoder(tiny_tokenizer)), number=1)
    assert search.texts_so_far(job) == [] and not search.is_running(job)
    counts = []
    while not search.is_idle:
        search.step()
        if search.is_running(job):
            counts.append(len(search.texts_so_far(job)[0]))
    # The first step runs the prompt and one token more.
    assert counts[0] > 0 and (np.diff(counts) > 0).all()
    assert search.texts_so_far(job) == [job.prompt.text(job.answers()[0])]


def test_beams_show_what_they_share():
    """With several beams there is text before the end, but not that of every step."""
    lengths: list[int] = []
    list(
        Generator(make_model(0), TOKENIZER).search(
            [{"input": "春天", "<ans>": ""}],
            GenerationOptions(beam_size=2, max_length=20),
            on_texts=lambda _, texts: lengths.append(sum(map(len, texts))),
        )
    )
    assert any(0 < length < lengths[-1] for length in lengths)
    assert 0 in np.diff(lengths[:-2])


@pytest.mark.parametrize("options", [{"beam_size": 1}, {"beam_size": 3}, {"temperature": 1.0}])
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_the_limit_of_tokens_is_exact(tiny_tokenizer, tiny_models, options, most):
    options = GenerationOptions(max_length=20, **options)
    prompt = Prompt.of({"input": "甲乙", "<ans>": ""}, Encoder(tiny_tokenizer))
    cut = 0
    for model in tiny_models:
        for number in range(2):
            search = BeamSearch(Decoder(model, tiny_tokenizer), options, 1)
            limited = search.add(prompt, number=number, most=most)
            free = search.add(prompt, number=number)
            while not search.is_idle:
                search.step()
            [written] = limited.answers()
            # With its `</s>`, which is no pair.
            assert len(written) + (not limited.was_cut) <= most
            if options.num_beams == 1:
                assert written == free.answers()[0][:most]
                assert limited.was_cut == (len(free.answers()[0]) + (not free.was_cut) > most)
            if limited.was_cut:
                cut += 1
                assert len(written) == most
    assert cut


def test_a_cancelled_job_frees_its_slot_at_once(tiny_model, tiny_tokenizer):
    options = GenerationOptions(beam_size=2, max_length=20)
    prompt = Prompt.of({"input": "甲乙", "<ans>": ""}, Encoder(tiny_tokenizer))
    search = BeamSearch(Decoder(tiny_model, tiny_tokenizer), options, 1)  # room for one
    first, second, third = (search.add(prompt) for _ in range(3))
    search.step()
    assert search.is_running(first) and not search.is_running(second)
    search.cancel(first)
    search.cancel(second)
    assert search.texts_so_far(first) == []
    search.step()
    assert search.is_running(third)
    search.cancel(third)
    assert search.is_idle and search.step() == []
