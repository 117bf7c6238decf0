"""src/text_generation.py as a user runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "text_generation.py"
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"SCRIPT NOT RUN ON THE TRAINED MODEL: there is no {GOLDEN}"
)


def run(*arguments, cwd, stdin=""):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def trained():
    return [
        *("--load", GOLDEN / "trained.bin"),
        *("--model-config", GOLDEN / "trained_config.json"),
        *("--vocab", SHARED / "vocab" / "bee.txt"),
    ]


def cases(**args):
    with open(GOLDEN / "trained_generation.jsonl", encoding="utf-8") as file:
        found = [case for line in file if (case := json.loads(line))["args"] == args]
    assert found
    return found


def write(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(text):
    return [json.loads(line) for line in text.splitlines()]


@needs_shared
def test_file_to_file(tmp_path):
    wanted = cases(beam_size=3, max_length=8, repetition_penalty=1.5, repetition_window=3)
    prompts = [case["prompt"] for case in wanted]
    source = write(tmp_path / "in.jsonl", prompts)
    done = run(
        *trained(),
        *("--input", source, "--output", "out/results.jsonl", "--beam-size", 3),
        *("--max-length", 8, "--repetition_penalty", 1.5, "--repetition-window", 3),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(wanted)} records written\n"
    results = read((tmp_path / "out" / "results.jsonl").read_text("utf-8"))
    assert results == [case["result"] for case in wanted]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in.jsonl", "out", "results.jsonl"]


@needs_shared
def test_stdin_to_stdout_with_answers_to_compare(tmp_path):
    wanted = [case["result"] for case in cases(beam_size=3, max_length=10, repetition_penalty=1.0)]
    given = [{**wanted[0], "<ans>": {"<mask_0>": "wrong", "x": {"y": ""}}}, *wanted[1:]]
    text = "".join(json.dumps(record) + "\n" for record in given)
    done = run(*trained(), "--input", "-", "--output", "-", cwd=tmp_path, stdin=text)
    assert done.returncode == 0
    assert read(done.stdout) == wanted
    n = len(wanted)
    assert f"exact match: {n - 1} of {n} answers" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@needs_shared
def test_delta_changes_the_answers(tmp_path):
    import torch

    name = "encoder.layers.{}.self_att.self_attention.{}.lora.{}"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name.format(layer, project, part): torch.randn(shape, generator=generator)
        for layer in range(2)
        for project in ("project_q", "project_v")
        for part, shape in (("lora_A", (8, 24)), ("lora_B", (32, 8)))
    }
    torch.save(tensors, tmp_path / "some-delta-best.pt")
    prompts = [case["prompt"] for case in cases(beam_size=1, max_length=10, repetition_penalty=1.0)]
    source = write(tmp_path / "in.jsonl", prompts)
    files = ["--input", source, "--max-length", 5, "--output"]
    plain = run(*trained(), *files, "plain.jsonl", cwd=tmp_path)
    tuned = run(*trained(), *files, "tuned.jsonl", "--delta", "some-delta-best.pt", cwd=tmp_path)
    assert (plain.returncode, tuned.returncode) == (0, 0)
    assert "warning: some-delta-best.pt does not record its alpha" in tuned.stderr
    more = ("--delta", "some-delta-best.pt", "--delta-alpha")
    outputs = {}
    for alpha in (16, 1e-9):
        done = run(*trained(), *files, f"{alpha}.jsonl", *more, alpha, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        outputs[alpha] = (tmp_path / f"{alpha}.jsonl").read_text("utf-8")
    assert outputs[16] == (tmp_path / "tuned.jsonl").read_text("utf-8")
    assert outputs[1e-9] == (tmp_path / "plain.jsonl").read_text("utf-8")
    plain_results = read((tmp_path / "plain.jsonl").read_text("utf-8"))
    tuned_results = read((tmp_path / "tuned.jsonl").read_text("utf-8"))
    assert len(plain_results) == len(tuned_results) == len(prompts)
    assert plain_results != tuned_results


def assert_refused(done, *parts):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_an_alpha_needs_a_delta(tmp_path):
    done = run("--input", "in.jsonl", "--output", "-", "--delta-alpha", 8, cwd=tmp_path)
    assert_refused(done, "--delta-alpha: needs --delta")


@pytest.mark.slow
def test_bad_records_are_all_reported_before_the_model_is_looked_for(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"input": "x<y", "<ans>": ""}\n[]\n{"input": ""}\n', encoding="utf-8")
    done = run("--input", source, "--output", "out.jsonl", "--load", "absent.bin", cwd=tmp_path)
    assert_refused(done, f"{source}:1: ", f"{source}:2: ", f"{source}:3: ", "3 problems")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.slow
@needs_shared
def test_a_special_token_that_the_vocabulary_lacks(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"<ans>": ""}, {"input": "<nonsense_1>", "<ans>": ""}])
    done = run(*trained(), "--input", source, "--output", "out.jsonl", cwd=tmp_path)
    assert_refused(done, f"{source}:2: special token <nonsense_1>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.slow
def test_missing_files_are_named(tmp_path):
    done = run("--input", "no.jsonl", "--output", "out.jsonl", cwd=tmp_path)
    assert_refused(done, "no.jsonl")
    source = write(tmp_path / "in.jsonl", [{"<ans>": ""}])
    done = run("--input", source, "--output", "out.jsonl", cwd=tmp_path)
    assert_refused(done, "ckpts/pytorch_model.bin")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--beam-size", "0"),
        ("--max-length", "-1"),
        ("--repetition-penalty", "0"),
        ("--repetition-window", "x"),
        ("--dtype", "fp8"),
    ],
)
def test_wrong_usage(tmp_path, flag, value):
    done = run("--input", "a", "--output", "b", flag, value, cwd=tmp_path)
    assert_refused(done, flag)


def test_help_answers_at_once(tmp_path):
    started = time.monotonic()
    done = run("--help", cwd=tmp_path)
    assert time.monotonic() - started < 1
    assert done.returncode == 0
    for flag in (
        *("--model-config", "--load", "--vocab", "--delta", "--input", "--output", "--beam-size"),
        *("--max-length", "--repetition-penalty", "--repetition-window", "--dtype", "--device"),
    ):
        assert flag in done.stdout
