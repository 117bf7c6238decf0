"""`OUTPUT.partial`: whatever ends generation, its records are kept and --resume goes on."""

import json
import os
import signal

import pytest

from cpm_bee.cli import command_line
from cpm_bee.data.record_source import located
from cpm_bee.disk import NamedFile
from cpm_bee.errors import InputError, InterruptedRun
from cpm_bee.files import BusyError
from cpm_bee.generate import jsonl
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.output import check_partial, resumable_file

OPTIONS = GenerationOptions()
SETTINGS = {"--load": "fingerprint 1", "--beam-size": 3}
SETTINGS_TEXT = json.dumps(SETTINGS)
GIVEN = [{"input": f"第{i}条", "<ans>": f"答{i}"} for i in range(4)]
RESULTS = [{**GIVEN[i], "<ans>": f"答{i % 3}"} for i in range(4)]  # all but the last are right


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Answers:
    """A generator with known answers that fails at record number `stop`."""

    def __init__(self, encoder, stop=None, failure=None):
        self.encoder, self.stop, self.failure = encoder, stop, failure
        self.answered = []

    def stream(self, records, options, max_tokens, numbers=None):
        for record in records:
            number = GIVEN.index(record)
            if number == self.stop:
                if isinstance(self.failure, signal.Signals):
                    signal.raise_signal(self.failure)
                raise self.failure
            self.answered.append(number)
            yield RESULTS[number]


@pytest.fixture
def encoder(tiny_tokenizer):
    from cpm_bee.encoding import Encoder

    return Encoder(tiny_tokenizer)


def generate(answers, output, *, given=GIVEN, settings=SETTINGS, resume=False):
    inputs = [located(f"f:{i}", record) for i, record in enumerate(given, start=1)]
    return jsonl.generate_file(
        answers, inputs, str(output), jsonl.FileOptions(OPTIONS, settings, resume=resume)
    )


def write_partial(path, results):
    path.write_text("".join(json.dumps(record) + "\n" for record in results))
    interrupted_settings(path.parent)


def interrupted_settings(folder, content=SETTINGS_TEXT):
    path = folder / "out.jsonl.partial.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), *SIGNALS])
def test_records_are_kept_and_resume_goes_on(tmp_path, encoder, stop, failure, caplog):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    output.write_text("of an earlier start")
    is_signal = isinstance(failure, signal.Signals)
    kind = InterruptedRun if is_signal else RuntimeError  # exit status 75
    kind = KeyboardInterrupt if failure is signal.SIGINT else kind  # 130
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(kind) as error:
        generate(Answers(encoder, stop, failure), output)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    if kind is InterruptedRun:
        assert str(error.value) == f"ended by {failure.name}" and error.value.exit_status == 75
    assert output.read_text() == "of an earlier start"
    if stop:
        go_on = f"to go on after them: {command_line('--resume')}"
        assert f"{stop} of 4 records are in {partial}; {go_on}" in caplog.text
        assert read(partial) == RESULTS[:stop]
        with pytest.raises(InputError) as refused:
            generate(Answers(encoder), output)
        assert f"{stop} records of an interrupted generation\n{go_on}" in str(refused.value)
        assert str(refused.value).endswith(f"to begin anew: rm {partial}")
        assert read(partial) == RESULTS[:stop]
        assert sorted(tmp_path.iterdir()) == [output, partial, tmp_path / f"{partial.name}.json"]
    else:
        assert not partial.exists()
    answers = Answers(encoder)
    assert generate(answers, output, resume=True) == (3, 4, 0)
    assert answers.answered == list(range(stop, 4))
    assert read(output) == RESULTS
    assert sorted(tmp_path.iterdir()) == [output]


def test_a_signal_within_a_write_writes_nothing_twice(tmp_path, encoder, monkeypatch):
    """A handler runs between the call of the system and the return of `write`."""
    original, calls = NamedFile.write, []

    def interrupted(self, data):
        written = original(self, data)
        if b"<ans>" in bytes(data):
            calls.append(data)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return written

    monkeypatch.setattr(NamedFile, "write", interrupted)
    with pytest.raises(InterruptedRun):
        generate(Answers(encoder), tmp_path / "out")
    monkeypatch.undo()
    lines = (tmp_path / "out.partial").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == RESULTS[:2]
    generate(Answers(encoder), tmp_path / "out", resume=True)
    lines = (tmp_path / "out").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == RESULTS


def test_a_line_that_a_kill_has_cut_is_generated_again(tmp_path, encoder):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RESULTS[:3])
    content = whole.encode()
    for length in range(len(content)):
        partial.write_bytes(content[:length])
        interrupted_settings(tmp_path)
        answers = Answers(encoder)
        generate(answers, output, resume=True)
        assert read(output) == RESULTS
        assert answers.answered[0] == content[:length].count(b"\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "partial:1: not valid JSON"),
        (["[]"], "partial:1: is not the record"),
        ([json.dumps(RESULTS[1])], "partial:1: is not the record"),
        ([json.dumps(RESULTS[0]), json.dumps(RESULTS[0])], "partial:2: is not the record"),
        ([json.dumps(r) for r in [*RESULTS, RESULTS[0]]], "partial:5: is not the record"),
        ([json.dumps({"<ans>": "", **GIVEN[0]})], "partial:1: is not the record"),  # other order
        ([json.dumps({**GIVEN[0], "<ans>": {"x": ""}})], "partial:1: is not the record"),
    ],
)
def test_records_of_another_input_are_refused_and_kept(tmp_path, encoder, lines, message):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("".join(f"{line}\n" for line in lines))
    before = partial.read_bytes()
    with pytest.raises(InputError, match=message):
        generate(Answers(encoder), tmp_path / "out.jsonl", resume=True)
    assert partial.read_bytes() == before and list(tmp_path.iterdir()) == [partial]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "--beam-size": 1}, "other settings:\n  --beam-size: was 3, now it is 1\n"),
        ({**SETTINGS, "--delta": "d"}, "other settings:\n  --delta: was None, now it is 'd'\n"),
        ({"--load": "x"}, "  --load: was 'fingerprint 1', now it is 'x'\n  --beam-size: was 3"),
    ],
)
def test_other_settings_are_named_and_refused(tmp_path, encoder, settings, message):
    partial = tmp_path / "out.jsonl.partial"
    write_partial(partial, RESULTS[:2])
    before = partial.read_bytes()
    with pytest.raises(InputError) as error:
        generate(Answers(encoder), tmp_path / "out.jsonl", settings=settings, resume=True)
    assert message in str(error.value) and str(error.value).endswith(f"rm {partial}")
    assert partial.read_bytes() == before
    partial.unlink()  # as the message says
    generate(Answers(encoder), tmp_path / "out.jsonl", settings=settings)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[" * 100_000])
def test_records_without_their_settings_are_refused_and_kept(tmp_path, encoder, content):
    partial, output = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl"
    write_partial(partial, RESULTS[:2])
    interrupted_settings(tmp_path, content)
    with pytest.raises(InputError, match=r"out\.jsonl\.partial\.json: cannot be read"):
        generate(Answers(encoder), output, resume=True)
    assert read(partial) == RESULTS[:2]
    write_partial(partial, [])  # killed while they were being written: nothing is lost
    interrupted_settings(tmp_path, content)
    generate(Answers(encoder), output)
    assert read(output) == RESULTS and list(tmp_path.iterdir()) == [output]


def test_what_stops_a_resume_is_said_before_a_model_is_loaded(tmp_path):
    write_partial(tmp_path / "out.jsonl.partial", RESULTS[:2])
    with pytest.raises(InputError, match="to begin anew: rm"):
        check_partial(tmp_path / "out.jsonl", GIVEN, resume=False)
    with pytest.raises(InputError, match="is not the record"):
        check_partial(tmp_path / "out.jsonl", GIVEN[1:], resume=True)
    check_partial(tmp_path / "out.jsonl", GIVEN, resume=True)
    new = tmp_path / "new.jsonl"
    with (
        resumable_file(new, GIVEN, {}, resume=False),
        pytest.raises(BusyError, match="is writing"),
    ):
        check_partial(new, GIVEN, resume=False)


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """While the first one is being worked off; the records written are there all the same."""
    path = tmp_path / "out.jsonl"
    if not (child := os.fork()):
        try:
            with resumable_file(path, GIVEN, {}, resume=False) as (file, _):
                file.write(json.dumps(RESULTS[0]) + "\n")
                file.flush()
                try:
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert read(tmp_path / "out.jsonl.partial") == RESULTS[:1]
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with resumable_file(tmp_path / "out.jsonl", GIVEN, {}, resume=False):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert (tmp_path / "out.jsonl").exists()


def test_one_process_writes_an_output(tmp_path):
    path = tmp_path / "made" / "out.jsonl"
    with resumable_file(path, GIVEN, {}, resume=False):
        with (
            pytest.raises(BusyError, match="is writing"),
            resumable_file(path, GIVEN, {}, resume=True),
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
