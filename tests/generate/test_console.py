"""Answers on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import forked
import pytest
from support import ROOT

from cpm_bee.errors import InputError
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.generate.console import Console, converse, record_of
from cpm_bee.generate.generator import Generator


def console_of(tiny_model, tiny_tokenizer, **flags) -> Console:
    flags = {"beam_size": 2, "max_length": 6, **flags}
    return Console(Generator(tiny_model, tiny_tokenizer), TextGenerationOptions(**flags))


def test_a_text_becomes_a_record():
    one = record_of("a < b", None, escape=False)
    assert one.record == {"input": "a << b", "<ans>": ""}
    assert one.given == {"input": "a < b", "<ans>": ""}
    assert record_of("甲", "翻译", escape=False).record == {
        "input": "甲", "prompt": "翻译", "<ans>": "",
    }  # fmt: skip


def test_json_is_a_record_as_it_is():
    assert record_of(' {"input": "甲"}', "翻译", escape=False).record == {
        "input": "甲",
        "<ans>": "",
    }
    assert record_of('{"a": "<"}', None, escape=True).record == {"a": "<<", "<ans>": ""}
    for text, reason in [("{", "not valid JSON"), ('{"a": 1}', "value of /a"), ('{"a<": ""}', "<")]:
        with pytest.raises(InputError, match=reason):
            record_of(text, None, escape=False)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_stream_prints_the_same_answer(tiny_model, tiny_tokenizer, capsys, beam_size):
    flags = {"beam_size": beam_size, "instruction": "续写"}
    console_of(tiny_model, tiny_tokenizer, **flags).answer("甲乙")
    whole = capsys.readouterr().out
    console_of(tiny_model, tiny_tokenizer, **flags, stream=True).answer("甲乙")
    assert capsys.readouterr().out == whole
    assert whole.strip()


def test_several_answers_and_options(tiny_model, tiny_tokenizer, capsys):
    console_of(tiny_model, tiny_tokenizer, num_return=2).answer("甲")
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines if re.match(r" *-?[0-9]", line)]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    record = json.dumps({"input": "甲", "o": {"<option_0>": "乙", "<option_1>": "丙"}})
    console_of(tiny_model, tiny_tokenizer, choices=2).answer(record)
    best, *ranked = capsys.readouterr().out.splitlines()
    assert best.split()[0] in ("<option_0>", "<option_1>")
    assert ranked[0].split()[1:] == best.split()
    shares = [float(line.split()[0].rstrip("%")) for line in ranked]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    console_of(tiny_model, tiny_tokenizer, choices=1, abstain_below=1.0).answer(record)
    assert capsys.readouterr().out.startswith("null")


def test_a_conversation(tiny_model, tiny_tokenizer, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    lines = [":help", "甲", '{"a": 1}', ":set beam-size 1", ":set beam-size 0", ":set nothing 1"]
    lines += [":instruction 翻译", ":what", "", ":quit", "never"]
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    console = console_of(tiny_model, tiny_tokenizer)
    converse(console)
    shown = capsys.readouterr()
    assert next(typed) == "never"
    assert console.options.beam_size == 1 and console.options.instruction == "翻译"
    problems = ["value of /a", "0 is less than 1", "FLAG is one of", ":what: there is no such"]
    assert all(problem in shown.err for problem in problems)
    assert shown.out.count(":instruction TEXT") == 2


def test_a_history_that_cannot_be_written_is_no_fault(
    tiny_model, tiny_tokenizer, monkeypatch, tmp_path
):
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    typed = iter([":q"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    converse(console_of(tiny_model, tiny_tokenizer))
    assert next(typed, "all were read") == "all were read"


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path) -> None:
    """As a user types it: a text, a mistake, a key for the line before, the end."""
    own, its = pty.openpty()
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "text_generation.py", "--load", "ckpts/cpm-bee-tiny"]
    command += ["--max-length", "4", "--stream"]
    process = forked.Popen(
        command, cwd=ROOT / "src", env=env, stdin=its, stdout=its, stderr=its, close_fds=True
    )
    os.close(its)
    seen = ""

    def read_until(pattern: str) -> None:
        nonlocal seen
        seen, end = "", time.monotonic() + 60
        while not re.search(pattern, seen, re.DOTALL):
            assert time.monotonic() < end, seen
            if select.select([own], [], [], 1)[0]:
                seen += os.read(own, 4096).decode(errors="replace")

    try:
        read_until("> ")
        for line, expected in [("春眠不觉晓\n", "> "), (":nothing\n", "no such command.*> ")]:
            os.write(own, line.encode())
            read_until(expected)
        # Hazard: before the prompt is there, the terminal itself would take the Ctrl-D.
        os.write(own, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(own)
    assert (tmp_path / "cpm_bee" / "history").read_text().splitlines()[-1] == ":nothing"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"input": "a"}, "--output: is needed"),
        ({"output": "a"}, "--output: needs --input"),
        ({"input": "a", "output": "b", "prompt": "c"}, "--prompt: is not for a file"),
        ({"input": "a", "output": "b", "stream": True}, "--stream: is not for a file"),
        ({"resume": True}, "--resume: needs --input"),
        ({"stream": True, "num_return": 2}, "--stream: shows one answer"),
        ({"abstain_below": 0.5}, "--abstain-below: needs --choices"),
        ({"input": "a", "output": "b", "keep": ("<ans>",)}, "--keep: <ans> is what"),
    ],
)
def test_flags_that_contradict(flags, expected):
    with pytest.raises(InputError, match=expected):
        TextGenerationOptions(**flags)


@pytest.mark.parametrize("words", [["average-orders"], ["3"], ["average-orders", "0"]])
def test_wrong_words_after_choices(words):
    with pytest.raises(InputError, match="average-orders"):
        TextGenerationOptions.parse(["--choices", *words])
    assert TextGenerationOptions.parse(["--choices", "average-orders", "4"]).choices == 4
    assert TextGenerationOptions.parse(["--choices"]).choices == 1
