"""/v1/generate: records in, records out as text_generation.py writes them."""

from __future__ import annotations

import json

import httpx
import pytest
from folders import load
from serve_support import Served

from cpm_bee.data.record_source import read_records
from cpm_bee.generate.choices import choose
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.jsonl import ChoiceOptions, FileOptions, generate_file
from cpm_bee.generate.options import GenerationOptions

RECORDS = [
    {"input": "春风", "<ans>": {"a": "", "b": {"c": ""}}},
    {"input": "a<<b<mask_0>", "<ans>": {"<mask_0>": "known"}},
    {"input": "𠮷ab天", "<ans>": "天"},
]
OPTIONS = {"<option_0>": "春", "<option_1>": "风a", "<option_2>": "b"}


@pytest.fixture(scope="module")
def generator(base) -> Generator:
    found = load(base)
    return Generator(found.model, found.tokenizer)


def generated(server: Served, **body) -> list[dict]:
    answer = server.post("/v1/generate", **body)
    assert answer.status_code == 200, answer.text
    records: list[dict] = answer.json()["records"]
    return records


def events_of(answer: httpx.Response) -> list[dict]:
    *lines, last = [line for line in answer.text.splitlines() if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("settings", [{"num_return": 2}, {"temperature": 1.0, "seed": 4}])
def test_records_are_answered_as_in_a_file(server: Served, generator, settings: dict) -> None:
    options = GenerationOptions(max_length=9, **settings)
    expected = list(generator.stream(RECORDS, options))
    answered = generated(server, records=RECORDS, max_length=9, **settings)
    for record, own in zip(answered, expected, strict=True):
        pairs = zip(record.get("<candidates>", ()), own.get("<candidates>", ()), strict=True)
        for one, other in pairs:  # scores are rounded otherwise in other company
            assert one["<ans>"] == other["<ans>"]
            assert one["score"] == pytest.approx(other["score"], rel=1e-5)
    unscored = [[{**r, "<candidates>": None} for r in given] for given in (answered, expected)]
    assert unscored[0] == unscored[1]


def test_plain_texts(server: Served, generator) -> None:
    plain = {"input": "a<b<mask_0>", "<ans>": ""}
    [answered] = generated(server, record=plain, escape=True, max_length=9)
    escaped = generator.generate(
        {**plain, "input": "a<<b<mask_0>"}, GenerationOptions(max_length=9)
    )
    assert answered["input"] == "a<b<mask_0>"
    assert answered["<ans>"] == escaped["<ans>"].replace("<<", "<")


@pytest.mark.parametrize("settings", [{"beam_size": 1}, {"beam_size": 2}, {"num_return": 2}])
def test_a_stream_has_the_parts_and_then_the_records(server: Served, settings: dict) -> None:
    body = {"records": RECORDS, "max_length": 9, **settings}
    expected = generated(server, **body)
    first, *events, last = events_of(server.post("/v1/generate", **body, stream=True))
    assert first["id"] and last.keys() == {"usage"}
    texts: dict[tuple[int, int], str] = {}
    records: dict[int, dict] = {}
    for event in events:
        if "record" in event:
            records[event["index"]] = event["record"]
        else:
            place = event["index"], event["answer"]
            assert event["index"] not in records
            texts[place] = texts.get(place, "") + event["delta"]
    assert [records[i] for i in range(len(RECORDS))] == expected
    if "num_return" not in settings:
        assert texts[2, 0] == expected[2]["<ans>"]
        first_answer = expected[0]["<ans>"]
        assert texts.get((0, 0), "") == first_answer["a"]
        assert texts.get((0, 1), "") == (first_answer["b"]["c"] or "")


def test_orders_of_options_are_those_of_a_file(server: Served, generator, tmp_path) -> None:
    """Each record has the orders of its place in the request, as in a file with these records."""
    records = [{"input": text, "options": OPTIONS, "<ans>": ""} for text in ("春", "天b", "春")]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    given = read_records(str(tmp_path / "in.jsonl"))
    probabilities = []
    for seed in (0, 5):
        output = tmp_path / f"out{seed}.jsonl"
        options = FileOptions(GenerationOptions(), choices=ChoiceOptions(orders=2, seed=seed))
        generate_file(generator, given, str(output), options)
        expected = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        body = {"choices": True, "average_orders": 2, **({"seed": seed} if seed else {})}
        answered = generated(server, records=records, **body)
        for own, other in zip(answered, expected, strict=True):
            assert own["<ans>"] == other["<ans>"]
            assert own["<choices>"] == pytest.approx(other["<choices>"], rel=1e-5)
        probabilities.append([own["<choices>"]["<option_0>"] for own in answered])
    # Or it would show little: equal records in other places have other orders, as have seeds.
    assert probabilities[0][0] != pytest.approx(probabilities[0][2], rel=1e-5)
    assert probabilities[0] != pytest.approx(probabilities[1], rel=1e-5)


@pytest.mark.parametrize("orders", [1, 2, 6])
def test_options_with_probabilities(server: Served, generator, orders: int) -> None:
    """The probabilities of a record do not depend on those beside it, also over several orders."""
    records = [{"input": text, "options": OPTIONS, "<ans>": ""} for text in ("春", "天b")]
    body = {"choices": True, "average_orders": orders}
    together = generated(server, records=records, **body)
    for record, answered in zip(records, together, strict=True):
        [choice] = choose(
            generator.model,
            generator.encoder,
            [record],
            max_tokens=8192,
            orders=orders,
            numbers=[records.index(record)],
        )
        assert choice is not None
        assert answered["<choices>"] == pytest.approx(choice.probabilities, rel=1e-5)
        assert answered["<ans>"] == choice.best
        [best] = [answered["<choices>"][choice.best]]
        for below, kept in ((best * 0.99, choice.best), (min(best * 1.01, 1), None)):
            abstained = generated(server, records=records, abstain_below=below, **body)
            assert abstained[records.index(record)]["<ans>"] == kept
