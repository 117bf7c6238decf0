"""--keep, --choices, --prompt and the prompt on a terminal, as a user types them."""

import codecs
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "text_generation.py"
MODEL = ("--load", ROOT / "src" / "ckpts" / "cpm-bee-tiny" / "pytorch_model.bin")
SHORT = ("--max-length", "4", "--beam-size", "1")


def environment(folder):
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder / "state")}


def run(*arguments, cwd, stdin=None):
    return forked.run(
        [sys.executable, str(SCRIPT), *map(str, (*MODEL, *SHORT, *arguments))],
        cwd=cwd, input=stdin, capture_output=True, encoding="utf-8", env=environment(cwd),
        timeout=300, stdin=subprocess.DEVNULL if stdin is None else None,
    )  # fmt: skip


def read(text):
    return [json.loads(line) for line in text.splitlines()]


OPTIONS = {"<option_0>": "甲", "<option_1>": "乙", "<option_2>": "丙"}
MIXED = [
    {
        "id": 1,
        "input": "下一句",
        "options": OPTIONS,
        "<ans>": "<option_1>",
        "source": {"a": [None]},
    },
    {"source": 0.5, "input": "春眠不觉晓", "<ans>": ""},
    {"input": "春", "options": OPTIONS, "<ans>": {"x": "", "y": {"z": ""}}},
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A folder with the answers of MIXED in mixed.jsonl."""
    folder = tmp_path_factory.mktemp("flags")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in MIXED)
    (folder / "in.jsonl").write_text(lines, encoding="utf-8")
    done = run(*FLAGS, "--input", "in.jsonl", "--output", "mixed.jsonl", cwd=folder)
    assert not done.returncode, done.stderr
    return folder


FLAGS = ("--keep", "id,source", "--choices", "average-orders", "3")


@pytest.mark.slow
def test_records_with_and_without_options_in_one_file(answered):
    first, second, third = read((answered / "mixed.jsonl").read_text("utf-8"))
    assert list(first) == [*MIXED[0], "<choices>"] and list(second) == list(MIXED[1])
    assert (first["id"], first["source"], second["source"]) == (1, {"a": [None]}, 0.5)
    assert sum(first["<choices>"].values()) == pytest.approx(1)
    assert first["<ans>"] == max(first["<choices>"], key=first["<choices>"].get)
    assert isinstance(second["<ans>"], str)
    assert set(third["<ans>"]) == {"x", "y"} and set(third["<ans>"]["y"]) == {"z"}


@pytest.mark.slow
def test_resuming_goes_on_with_the_same_flags_alone(answered):
    whole = (answered / "mixed.jsonl").read_text("utf-8")
    partial = answered / "again.jsonl.partial"
    flags = ("--input", "in.jsonl", "--output", "again.jsonl", "--resume")
    settings = forked.run(
        [sys.executable, "-c", SETTINGS, *map(str, (*MODEL, *SHORT, *FLAGS, *flags))],
        cwd=answered, capture_output=True, encoding="utf-8", env=environment(answered),
    )  # fmt: skip
    assert not settings.returncode, settings.stderr
    partial.write_text("".join(whole.splitlines(keepends=True)[:1]), encoding="utf-8")
    other = run(*FLAGS, "--abstain-below", "0.99", *flags, cwd=answered)
    assert other.returncode == 2 and "--abstain-below: was None, now it is 0.99" in other.stderr
    done = run(*FLAGS, *flags, cwd=answered)
    assert not done.returncode, done.stderr
    assert (answered / "again.jsonl").read_text("utf-8") == whole


# Stops as a kill does, before the first record.
SETTINGS = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "src")!r})
import text_generation
from cpm_bee.generate import jsonl
jsonl.answer_all = lambda *_: (os._exit(0) for _ in [0])
text_generation.main()
"""


@pytest.mark.slow
def test_without_any_options_choices_have_no_effect_and_are_refused(tmp_path):
    done = run(
        *("--input", "-", "--output", "o.jsonl", "--choices", "--load", "absent.bin"),
        cwd=tmp_path, stdin='{"input": "a", "<ans>": ""}\n',
    )  # fmt: skip
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert "--choices: none of the 1 records has options" in done.stderr


@pytest.mark.slow
def test_one_record_on_the_command_line(tmp_path):
    record = json.dumps({"input": "春眠不觉晓", "<ans>": ""})
    plain, streamed = (
        run("--prompt", record, cwd=tmp_path),
        run("--prompt", "春眠不觉晓", "--stream", cwd=tmp_path),
    )
    assert (plain.returncode, plain.stderr, streamed.stderr) == (0, "", "")
    assert plain.stdout.strip() and streamed.stdout == plain.stdout
    assert not any(tmp_path.iterdir())


class Terminal:
    """text_generation.py with a terminal of its own."""

    def __init__(self, folder, *flags):
        self.screen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()
        self.child, self.terminal = pty.fork()
        if not self.child:
            os.chdir(folder)
            command = [sys.executable, str(SCRIPT), *map(str, (*MODEL, *SHORT, *flags))]
            os.execve(sys.executable, command, {**environment(folder), "TERM": "dumb"})

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait_for(self, text, seconds=120):
        """Returns what the terminal shows up to the text, and takes it off."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert select.select([self.terminal], [], [], end - time.monotonic())[0], self.screen
            try:
                self.screen += self.decoder.decode(os.read(self.terminal, 4096))
            except OSError:  # closed: the process has ended
                raise AssertionError(self.screen) from None
        shown, _, self.screen = self.screen.partition(text)
        return shown

    def status(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("is_writable", [True, False])
def test_a_session_on_a_terminal(tmp_path, is_writable):
    if not is_writable:
        (tmp_path / "state").write_text("no folder")
    session = Terminal(tmp_path, "--stream")
    session.wait_for("> ")
    session.type("春眠不觉晓\n")
    answer = session.wait_for("> ").splitlines()[1:]
    assert "".join(answer).strip()
    session.type('{"input": 3, "<ans>": ""}\n')
    assert "/input: expected text" in session.wait_for("> ")
    session.type(":set beam-size none-such\n")
    assert "is not a whole number" in session.wait_for("> ")
    session.type(":set temperature 100\n")
    session.wait_for("> ")
    session.type("春眠不觉晓\n")
    assert session.wait_for("> ").splitlines()[1:] != answer
    session.type("\x04")
    assert session.status() == 0
    history = tmp_path / "state" / "cpm_bee" / "history"
    assert history.exists() == is_writable
    assert not is_writable or "春眠不觉晓" in history.read_text("utf-8")
