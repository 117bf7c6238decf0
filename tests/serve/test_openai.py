"""The server as the real `openai` client sees it."""

from __future__ import annotations

import openai
import pytest
from folders import load
from serve_support import Served

from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.tokenizer import escape, unescape

LENGTH = 30  # the server's --max-length
LONG = "ab天"  # the small model answers it with as many tokens as it may write


@pytest.fixture(scope="module")
def generator(base):
    found = load(base)
    return Generator(found.model, found.tokenizer)


def chat(text, *earlier):
    return [*earlier, {"role": "user", "content": text}]


def expected(generator, record, **options):
    options = GenerationOptions(**{"max_length": LENGTH, **options})
    return unescape(generator.generate(record, options)["<ans>"])


def test_models(server: Served) -> None:
    client = server.openai()
    [model] = client.models.list().data
    assert model.id == "small-model" and client.models.retrieve("small-model").id == model.id


@pytest.mark.parametrize("text", ["春风", "a<b", LONG, "<mask_0>", "𠮷"])
def test_a_chat_is_the_record_of_its_last_message(server: Served, generator, text: str) -> None:
    client = server.openai()
    done = client.chat.completions.create(model="small-model", messages=chat(text))
    own = text if text == "<mask_0>" else escape(text)
    [choice] = done.choices
    assert choice.message.content == expected(generator, {"input": own, "<ans>": ""})
    assert choice.message.role == "assistant"
    assert done.usage and done.usage.total_tokens > done.usage.completion_tokens > 0


def test_system_messages_and_earlier_turns_are_fields(server: Served, generator) -> None:
    earlier = (
        {"role": "system", "content": "ab"},
        {"role": "developer", "content": "春"},
        {"role": "user", "content": "天"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
    )
    client = server.openai()
    done = client.chat.completions.create(
        model="small-model",
        messages=chat("风", *earlier),
        extra_body={"fields": {"question": "b"}, "beam_size": 2},
    )
    record = {
        "system": "ab\n春",
        "history": {"1": {"user": "天"}, "2": {"assistant": "ab"}},
        "input": "风",
        "question": "b",
        "<ans>": "",
    }
    assert done.choices[0].message.content == expected(generator, record, beam_size=2)


def test_text_completions_of_several_prompts_and_with_a_suffix(server: Served, generator) -> None:
    client = server.openai()
    done = client.completions.create(model="small-model", prompt=["春", "风a"], n=2)
    wanted = []
    for text in ("春", "风a"):
        options = GenerationOptions(num_return=2, max_length=LENGTH)
        result = generator.generate({"input": text, "<ans>": ""}, options)
        wanted += [unescape(own["<ans>"]) for own in result["<candidates>"]]
    assert [choice.text for choice in done.choices] == wanted
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    done = client.completions.create(model="small-model", prompt="春", suffix="天")
    record = {"input": "春<mask_0>天", "<ans>": {"<mask_0>": ""}}
    answer = generator.generate(record, GenerationOptions(max_length=LENGTH))["<ans>"]["<mask_0>"]
    assert done.choices[0].text == unescape(answer)


def test_samples_depend_on_the_seed(server: Served, generator) -> None:
    client = server.openai()

    def texts(**settings):
        done = client.chat.completions.create(
            model="small-model", messages=chat("春风"), temperature=1.2, max_tokens=20, **settings
        )
        return [choice.message.content for choice in done.choices]

    assert texts(seed=5, n=3) == texts(seed=5, n=3)
    assert len({tuple(texts(n=3)) for _ in range(4)}) > 1  # each request draws a seed of its own
    whole = expected(
        generator, {"input": "春风", "<ans>": ""}, temperature=1.2, seed=5, max_length=18
    )  # so 20 tokens are possible
    assert texts(seed=5) == [whole]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {}])
def test_a_stream_is_the_whole_answer_in_pieces(server: Served, settings: dict) -> None:
    client = server.openai()
    request = {"model": "small-model", "messages": chat(LONG), "max_tokens": 40, **settings}
    whole = client.chat.completions.create(**request)
    stream = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert {chunk.id for chunk in stream} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    if settings:  # with beams, it depends on what they share
        assert len(chunks) > 4


def test_a_stream_of_several_answers_and_of_text(server: Served) -> None:
    client = server.openai()
    request = {"model": "small-model", "prompt": [LONG, "春"], "max_tokens": 20, "n": 2, "seed": 1}
    whole = client.completions.create(**request, temperature=1)
    texts = ["", "", "", ""]
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**request, temperature=1, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("most", [1, 2, 7])
def test_the_limit_of_tokens_is_exact(server: Served, most: int) -> None:
    for settings in ({"temperature": 0}, {}):
        done = server.openai().chat.completions.create(
            model="small-model", messages=chat(LONG), max_completion_tokens=most, **settings
        )
        assert done.usage.completion_tokens == most
        assert done.choices[0].finish_reason == "length"


def test_an_answer_that_ends_stops(server: Served) -> None:
    done = server.openai().completions.create(
        model="small-model", prompt="b", temperature=0, max_tokens=400
    )
    assert done.choices[0].finish_reason == "stop"
    assert 1 < done.usage.completion_tokens < 400


def greedy(server: Served, **settings):
    return server.openai().completions.create(
        model="small-model", prompt=LONG, **{"temperature": 0, "max_tokens": 40, **settings}
    )


def middle_of(text: str) -> str:
    """A part of a text of several tokens that does not appear before."""
    for start in range(len(text) // 3, len(text) - 4):
        if text.find(text[start : start + 4]) == start:
            return text[start : start + 4]
    raise AssertionError(f"{text!r} repeats itself")


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_stop_sequence_ends_the_answer_and_is_no_part_of_it(
    server: Served, is_alone: bool
) -> None:
    """Its tokens count: usage is as if the answer had been cut off behind it."""
    whole = greedy(server).choices[0].text
    stop = middle_of(whole)
    done = greedy(server, stop=stop if is_alone else ["never there", stop, whole[-2:] + "x"])
    [choice] = done.choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    written = done.usage.completion_tokens
    assert 2 < written < 40
    assert stop in greedy(server, max_tokens=written).choices[0].text
    assert stop not in greedy(server, max_tokens=written - 1).choices[0].text


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": None}]
)
def test_a_stream_never_shows_a_stop_sequence(server: Served, settings: dict) -> None:
    whole = greedy(server, **settings).choices[0].text
    stop = middle_of(whole)
    plain = greedy(server, stop=stop, **settings)
    chunks = list(
        greedy(server, stop=stop, stream=True, stream_options={"include_usage": True}, **settings)
    )
    *_, ended, last = chunks
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == plain.choices[0].text and stop not in text
    assert ended.choices[0].finish_reason == plain.choices[0].finish_reason
    assert last.usage == plain.usage
    if settings["temperature"] is not None:  # of beams, another one may be the best then
        assert text == whole[: whole.index(stop)] and ended.choices[0].finish_reason == "stop"


def test_each_of_several_samples_stops_by_itself(server: Served) -> None:
    settings = {"temperature": 1, "seed": 8, "n": 4}
    wholes = [choice.text for choice in greedy(server, **settings).choices]
    letter = max("ab天春风x", key=lambda own: sum(own in text for text in wholes))
    assert sum(letter in text for text in wholes) > 1
    done = greedy(server, **settings, stop=letter)
    # Once a sample has ended, the others draw other numbers than they would beside it.
    assert not any(letter in choice.text for choice in done.choices)
    parts = {text.partition(letter)[0] for text in wholes if letter in text}
    assert min(parts, key=len) in {choice.text for choice in done.choices}
    assert "stop" in [choice.finish_reason for choice in done.choices]


def test_a_stop_sequence_that_never_comes_changes_nothing(server: Served) -> None:
    for settings in ({}, {"temperature": None}):
        plain = greedy(server, **settings)
        done = greedy(server, **settings, stop="never there")
        assert done.choices == plain.choices and done.usage == plain.usage


def test_errors_are_those_of_the_client(server: Served) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=chat("a"))
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as refused:
        client.chat.completions.create(
            model="small-model", messages=chat("a"), presence_penalty=0.5
        )
    assert refused.value.code == "unsupported_parameter"
    # The values that ask for nothing are not refused.
    client.chat.completions.create(
        model="small-model",
        messages=chat("a"),
        presence_penalty=0,
        frequency_penalty=0,
        top_p=1,
        logprobs=False,
        response_format={"type": "text"},
        user="somebody",
        max_tokens=1,
    )
