"""`OUTPUT.partial`: whatever ends generation, its records are kept and --resume goes on."""

import json
import signal

import pytest

from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, InterruptedRun
from cpm_bee.files import BusyError
from cpm_bee.generate import jsonl
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.output import resumable_file

OPTIONS = GenerationOptions()
GIVEN = [{"input": f"第{i}条", "<ans>": f"答{i}"} for i in range(4)]
RESULTS = [{**GIVEN[i], "<ans>": f"答{i % 3}"} for i in range(4)]  # all but the last are right


class Answers:
    """A generator with known answers that fails at record number `stop`."""

    def __init__(self, encoder, stop=None, failure=None):
        self.encoder, self.stop, self.failure = encoder, stop, failure
        self.answered = []

    def generate(self, record, options):
        number = GIVEN.index(record)
        if number == self.stop:
            if isinstance(self.failure, signal.Signals):
                signal.raise_signal(self.failure)
            raise self.failure
        self.answered.append(number)
        return RESULTS[number]


@pytest.fixture
def encoder(tiny_tokenizer):
    return Encoder(tiny_tokenizer)


def generate(answers, output, *, given=GIVEN, resume=False):
    inputs = [jsonl.InputRecord(f"f:{i}", record) for i, record in enumerate(given, start=1)]
    return jsonl.generate_file(answers, inputs, OPTIONS, str(output), resume=resume)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize(
    "failure", [RuntimeError("out of memory"), signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_records_are_kept_and_resume_goes_on(tmp_path, encoder, stop, failure, caplog):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    output.write_text("of an earlier start")
    is_signal = isinstance(failure, signal.Signals)
    with pytest.raises(InterruptedRun if is_signal else RuntimeError) as error:
        generate(Answers(encoder, stop, failure), output)
    assert output.read_text() == "of an earlier start"
    if stop:
        text = f"{stop} of 4 records are in {partial}"
        assert text in (str(error.value) if is_signal else caplog.text)
        assert read(partial) == RESULTS[:stop]
        with pytest.raises(InputError, match="add --resume"):
            generate(Answers(encoder), output)
    else:
        assert not partial.exists()
    answers = Answers(encoder)
    assert generate(answers, output, resume=True) == (3, 4)
    assert answers.answered == list(range(stop, 4))
    assert read(output) == RESULTS
    assert sorted(tmp_path.iterdir()) == [output]


def test_a_line_that_a_kill_has_cut_is_generated_again(tmp_path, encoder):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RESULTS[:3])
    content = whole.encode()
    for length in range(len(content)):
        partial.write_bytes(content[:length])
        answers = Answers(encoder)
        generate(answers, output, resume=True)
        assert read(output) == RESULTS
        assert answers.answered[0] == content[:length].count(b"\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "partial:1: not valid JSON"),
        (["[]"], "partial:1: does not match record"),
        ([json.dumps(RESULTS[1])], "partial:1: does not match record"),
        ([json.dumps(RESULTS[0]), json.dumps(RESULTS[0])], "partial:2: does not match record"),
        ([json.dumps(r) for r in [*RESULTS, RESULTS[0]]], "partial:5: does not match record"),
    ],
)
def test_records_of_another_input_are_refused_and_kept(tmp_path, encoder, lines, message):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("".join(f"{line}\n" for line in lines))
    before = partial.read_bytes()
    with pytest.raises(InputError, match=message):
        generate(Answers(encoder), tmp_path / "out.jsonl", resume=True)
    assert partial.read_bytes() == before and list(tmp_path.iterdir()) == [partial]


def test_one_process_writes_an_output(tmp_path):
    path = tmp_path / "made" / "out.jsonl"
    with resumable_file(path, GIVEN, resume=False):
        with (
            pytest.raises(BusyError, match="is writing"),
            resumable_file(path, GIVEN, resume=True),
        ):
            pass
        assert (tmp_path / "made" / "out.jsonl.partial").exists()
    assert path.exists() and list(path.parent.iterdir()) == [path]


def test_a_folder_and_standard_output(tmp_path, encoder):
    with pytest.raises(InputError, match="this is a folder"):
        generate(Answers(encoder), tmp_path)
    with pytest.raises(InputError, match="standard output cannot be resumed"):
        generate(Answers(encoder), "-", resume=True)
    generate(Answers(encoder), "/dev/null")


def test_a_link_stays_a_link(tmp_path, encoder):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.touch()
    link.symlink_to(target)
    generate(Answers(encoder), link)
    assert link.is_symlink() and read(target) == RESULTS


def test_escaped_texts_are_written_as_they_were(tmp_path, tiny_tokenizer):
    given = [{"input": "a<b && <mask_0> <<c </s>", "<ans>": {"<mask_0>": "<p>"}}]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(given[0]) + "\n")
    with pytest.raises(InputError, match="--escape"):
        jsonl.read_records(str(source))
    inputs = jsonl.read_records(str(source), escape=True)
    assert inputs[0].record["input"] == "a<<b && <mask_0> <<<<c <</s>"

    class Repeats:
        """Answers with the answer that it was given."""

        def __init__(self):
            self.encoder = Encoder(tiny_tokenizer)

        def generate(self, record, options):
            assert record["<ans>"] == {"<mask_0>": "<<p>"}
            return record

    output = tmp_path / "out.jsonl"
    for resume in (False, True):
        score = jsonl.generate_file(
            Repeats(), inputs, OPTIONS, str(output), resume=resume, escaped=True
        )
        assert score == (1, 1) and read(output) == given
        output.rename(tmp_path / "out.jsonl.partial")
