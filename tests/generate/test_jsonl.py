import io
import json
import os

import pytest
from generation_support import unmarked

from cpm_bee.data.record_source import located, read_records
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.generate import jsonl
from cpm_bee.generate.choices import choose
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.jsonl import FileOptions
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.tokenizer import unescape

OPTIONS = GenerationOptions(beam_size=2, max_length=2)


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_all_bad_lines_are_listed_at_once(tmp_path):
    path = write(
        tmp_path / "in.jsonl",
        '{"input": "a<", "<ans>": ""}',
        "",
        '{"input": "good", "<ans>": ""}',
        "not json",
        '{"input": 3}',
    )
    with pytest.raises(InputError) as error:
        read_records(path)
    message = str(error.value)
    assert "4 problems" in message and f"{path}:3" not in message
    assert f"{path}:1: value of /input" in message
    assert f"{path}:4: not valid JSON" in message
    assert message.count(f"{path}:5: ") == 2


def test_an_input_without_records_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no records"):
        read_records(write(tmp_path / "in.jsonl", "", " "))


def test_records_from_standard_input(monkeypatch):
    text = '\ufeff{"<ans>": "甲"}\r\n\n{"<ans>": "\u2028"}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [(one.where, one.record) for one in read_records("-")] == [
        ("standard input:1", {"<ans>": "甲"}),
        ("standard input:3", {"<ans>": "\u2028"}),
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(InputError, match="not UTF-8"):
        read_records("-")


def test_results_are_written_in_order_and_scored(tmp_path, tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    prompts = [{"input": text, "<ans>": {"x": ""}} for text in ("甲", "乙", "丙")]
    results = [generator.generate(prompt, OPTIONS) for prompt in prompts]
    placed = [
        located("f:1", unmarked(results[0])),  # comes with the answer the model gives
        located("f:2", prompts[1]),  # with none
        located("f:3", {**prompts[2], "<ans>": {"x": "another"}}),
    ]
    output = tmp_path / "out.jsonl"
    score = jsonl.generate_file(generator, placed, str(output), FileOptions(OPTIONS))
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == results
    assert score == (1, 2, 0)
    assert score.lines() == ["exact match: 1 of 2 answers (50.0%)"]


def test_what_the_vocabulary_lacks_is_listed_and_nothing_written(
    tmp_path, tiny_model, tiny_tokenizer
):
    placed = [
        located("f:1", {"input": "<wrong_1>", "<ans>": ""}),
        located("f:2", {"input": "甲", "<ans>": ""}),
        located("f:3", {"<also>": "甲", "<ans>": ""}),
    ]
    generator = Generator(tiny_model, tiny_tokenizer)
    with pytest.raises(InputError) as error:
        jsonl.generate_file(generator, placed, str(tmp_path / "out.jsonl"), FileOptions(OPTIONS))
    assert "2 records" in str(error.value)
    assert "f:1: special token <wrong_1>" in str(error.value) and "f:3: " in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
def test_an_output_that_is_one_of_the_inputs_is_refused(tmp_path, link):
    source = write(tmp_path / "in.jsonl", '{"<ans>": ""}')
    output = tmp_path / "out.jsonl"
    if link == "itself":
        output = tmp_path / "sub" / ".." / "in.jsonl"
        (tmp_path / "sub").mkdir()
    elif link == "symbolic":
        output.symlink_to(source)
    else:
        output.hardlink_to(source)
    with pytest.raises(InputError, match=r"is the file .*in\.jsonl itself"):
        jsonl.check_output(str(output), ("-", source))


@pytest.mark.parametrize("suffix", [".partial", ".partial.json"])
def test_an_input_that_would_be_written_on_the_way_is_refused(tmp_path, suffix):
    source = write(tmp_path / f"out.jsonl{suffix}", '{"<ans>": ""}')
    with pytest.raises(InputError, match=r"is written to .* first, which is the file"):
        jsonl.check_output(str(tmp_path / "out.jsonl"), (source,))


def test_standard_input_that_is_the_output_is_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", '{"<ans>": ""}')
    fstat = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda number: os.stat(source) if not number else fstat(number)
    )
    with pytest.raises(InputError, match="is the file standard input itself"):
        jsonl.check_output(source, ("-",))
    jsonl.check_output(str(tmp_path / "out.jsonl"), ("-",))


def test_all_files_of_the_model_are_read(tmp_path):
    names = ["model.bin", "model.json", "config.json", "vocab.txt", "some-delta.pt"]
    names += ["some-delta.json", "own.txt", "own.json"]
    for name in names:
        write(tmp_path / name)
    flags = {"load": "model.bin", "delta": "some-delta.pt", "vocab": "own.txt"}
    flags = {name: str(tmp_path / path) for name, path in flags.items()}
    options = TextGenerationOptions(
        input="-", output="o", model_config=str(tmp_path / "own.json"), **flags
    )
    for name in names:
        with pytest.raises(InputError, match="itself, which is read"):
            jsonl.check_output(str(tmp_path / name), options.files_read())
    folder = TextGenerationOptions(input="-", output="o", load=str(tmp_path))
    with pytest.raises(InputError, match="itself, which is read"):
        jsonl.check_output(str(tmp_path / "model.bin"), folder.files_read())
    jsonl.check_output(write(tmp_path / "old.jsonl"), options.files_read())


class Echo:
    """Answers with what it was given, as the model would write it: escaped."""

    def __init__(self, encoder):
        self.encoder = encoder

    def stream(self, records, options, max_tokens, numbers):
        return ({**record, "<ans>": {"x": record["input"], "y": None}} for record in records)


PLAIN = [
    {"input": "<p>甲 << 乙</p> <option_0> <", "<ans>": {"x": "a<b", "y": ""}},
    {"input": "<<<option_1>", "<ans>": {"x": "<s>", "y": ""}},
]


def test_with_escape_plain_texts_come_out_as_they_went_in(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "in.jsonl", *(json.dumps(record) for record in PLAIN))
    with pytest.raises(InputError, match="or give --escape"):
        read_records(source)
    inputs = read_records(source, escape=True)
    assert [one.given for one in inputs] == PLAIN
    output = tmp_path / "out.jsonl"
    echo = Echo(Encoder(tiny_tokenizer))
    jsonl.generate_file(echo, inputs, str(output), FileOptions(OPTIONS, escape=True))
    results = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert results == [{**r, "<ans>": {"x": r["input"], "y": None}} for r in PLAIN]


def test_with_escape_plain_answers_are_compared(tmp_path, tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    result = generator.generate({"input": "甲 << 乙", "<ans>": ""}, OPTIONS)
    given = {"input": "甲 < 乙", "<ans>": unescape(result["<ans>"])}
    output = tmp_path / "out.jsonl"
    placed = [located("f:1", given, escape=True)]
    score = jsonl.generate_file(generator, placed, str(output), FileOptions(OPTIONS, escape=True))
    assert score == (1, 1, 0)
    assert unmarked(json.loads(output.read_text("utf-8"))) == given


def test_an_earlier_output_can_be_read(tmp_path):
    marked = {"input": "甲", "<ans>": "乙", "<cut>": True, "<candidates>": [], "<choices>": {}}
    source = write(tmp_path / "in.jsonl", json.dumps(marked))
    [one] = read_records(source)
    assert one == (f"{source}:1", unmarked(marked), unmarked(marked), {})


def test_an_output_of_its_own_is_accepted(tmp_path):
    source = write(tmp_path / "in.jsonl", '{"<ans>": ""}')
    jsonl.check_output("-", (source,))
    jsonl.check_output(str(tmp_path / "new.jsonl"), (source, "-"))
    jsonl.check_output(write(tmp_path / "old.jsonl"), (source,))


# ------------------------------------------------------------------ kept fields, and options

CHOOSE = {"input": "甲", "o": {"<option_0>": "乙", "<option_1>": "丙", "<option_2>": "丁"}}


def test_kept_fields_pass_through_and_are_not_shown(tmp_path, tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    given = [{"id": 7, "input": "甲 < 乙", "<ans>": "", "source": {"a": [None, "<"]}}]
    source = write(tmp_path / "in.jsonl", *map(json.dumps, given))
    with pytest.raises(InputError, match="value of /id"):
        read_records(source, escape=True)
    inputs = read_records(source, escape=True, keep=("id", "source", "absent"))
    assert inputs[0].record == {"input": "甲 << 乙", "<ans>": ""}
    output = tmp_path / "out.jsonl"
    jsonl.generate_file(generator, inputs, str(output), FileOptions(OPTIONS, escape=True))
    [result] = map(json.loads, output.read_text("utf-8").splitlines())
    expected = generator.generate(inputs[0].record, OPTIONS)["<ans>"]
    assert result.pop("<ans>") == unescape(expected)
    assert unmarked(result) == {key: given[0][key] for key in ("id", "input", "source")}
    assert [key for key in result if key in given[0]] == ["id", "input", "source"]


def mixed_records():
    return [{**CHOOSE, "input": "甲" * n, "<ans>": "<option_1>"} for n in (1, 3, 2)] + [
        {"input": "丁", "<ans>": ""}
    ]


def test_options_are_chosen_and_other_records_generated(tmp_path, tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    given = mixed_records()
    inputs = [located(f"f:{i}", record) for i, record in enumerate(given)]
    output = tmp_path / "out.jsonl"
    choices = jsonl.ChoiceOptions()
    score = jsonl.generate_file(
        generator, inputs, str(output), FileOptions(OPTIONS, choices=choices)
    )
    results = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert results[3] == generator.generate(given[3], OPTIONS)
    found = choose(tiny_model, generator.encoder, given[:3], max_tokens=1000)
    for result, choice in zip(results[:3], found, strict=True):
        assert result["<ans>"] == choice.best
        assert result["<choices>"] == pytest.approx(choice.probabilities, rel=1e-5)
    assert score == (sum(r["<ans>"] == "<option_1>" for r in results[:3]), 3, 0)


def test_it_abstains_below_a_probability(tmp_path, tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    inputs = [located(f"f:{i}", record) for i, record in enumerate(mixed_records())]
    output = tmp_path / "out.jsonl"
    best = [
        max(result["<choices>"].values())
        for result in jsonl.answer_all(
            generator, [one.record for one in inputs[:3]], [0, 1, 2], OPTIONS, None,
            jsonl.ChoiceOptions(),
        )
    ]  # fmt: skip
    bound = sorted(best)[1]  # one is below it
    choices = jsonl.ChoiceOptions(abstain_below=bound)
    score = jsonl.generate_file(
        generator, inputs, str(output), FileOptions(OPTIONS, choices=choices)
    )
    results = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [r["<ans>"] is None for r in results[:3]] == [p < bound for p in best]
    assert score.abstained == 1 and score.lines()[0].startswith("abstained: 1 records")


def test_averaged_orders_depend_on_the_number_of_the_record_alone(tiny_model, tiny_tokenizer):
    generator = Generator(tiny_model, tiny_tokenizer)
    records = mixed_records()
    choices = jsonl.ChoiceOptions(orders=3)
    together = list(jsonl.answer_all(generator, records, range(4), OPTIONS, None, choices))
    later = list(jsonl.answer_all(generator, records[2:], [2, 3], OPTIONS, None, choices))
    assert later[1] == together[3]
    assert later[0]["<choices>"] == pytest.approx(together[2]["<choices>"], rel=1e-5)
    first = list(jsonl.answer_all(generator, records[2:], [0, 1], OPTIONS, None, choices))
    assert first[0]["<choices>"] != pytest.approx(together[2]["<choices>"], rel=1e-4)
