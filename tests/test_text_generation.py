"""src/text_generation.py as a user runs it."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "text_generation.py"
TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"SCRIPT NOT RUN ON THE TRAINED MODEL: there is no {GOLDEN}"
)


def run(*arguments, cwd, stdin=""):
    return forked.run(
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


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
def test_an_output_that_is_the_input_is_refused_before_the_model_is_looked_for(tmp_path, link):
    source = write(tmp_path / "in.jsonl", [{"<ans>": "kept"}])
    output = tmp_path / "out.jsonl"
    if link == "symbolic":
        output.symlink_to("in.jsonl")
    elif link == "hard":
        output.hardlink_to(source)
    else:
        output = "../" + tmp_path.name + "/in.jsonl"
    done = run("--input", source, "--output", output, "--load", "absent", cwd=tmp_path)
    assert_refused(done, f"this is the file {source} itself")
    assert read(source.read_text("utf-8")) == [{"<ans>": "kept"}]


def start(*arguments, cwd):
    return forked.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_lines(process, partial, count):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if partial.exists() and partial.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_file(tmp_path):
    """kill -9 at random moments, loading included; each start goes on after the records done."""
    records = [{"input": f"写第{i}首 <b>长诗", "<ans>": ""} for i in range(60)]
    flags = ["--load", TINY, "--input", write(tmp_path / "in.jsonl", records), "--escape"]
    # Room for a record or two at a time, so that a kill finds some written.
    flags += ["--max-length", 6, "--beam-size", 2, "--max-tokens", 80, "--output"]
    assert run(*flags, "whole.jsonl", cwd=tmp_path).returncode == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [record["input"] for record in read(whole.decode())] == [r["input"] for r in records]
    folder = tmp_path / "made"
    partial, output = folder / "out.jsonl.partial", folder / "out.jsonl"
    rng = random.Random()
    kills, before = 0, 0
    for _ in range(6):
        process = start(*flags, output, "--resume", cwd=tmp_path)
        wait_for_lines(process, partial, before + rng.randrange(12))
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        assert not any(name.startswith(".") for name in names)
        if output.exists():
            break
        content = partial.read_bytes() if partial.exists() else b""
        assert whole.startswith(content[: content.rfind(b"\n") + 1])
        assert content.count(b"\n") >= before
        before = content.count(b"\n")
    assert kills >= 2 and before
    assert run(*flags, output, "--resume", cwd=tmp_path).returncode == 0
    assert output.read_bytes() == whole
    assert list(folder.iterdir()) == [output]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_keeps_the_records_and_prints_the_command_that_goes_on(tmp_path, number, status):
    folder = tmp_path / "my 文件"
    folder.mkdir()
    records = [{"input": f"写第{i}首长诗", "<ans>": ""} for i in range(80)]
    flags = ["--load", TINY, "--input", write(folder / "in.jsonl", records), "--beam-size", 1]
    flags += ["--max-tokens", 1]  # one record at a time, so that a signal finds some written
    partial, output = folder / "out.jsonl.partial", folder / "out.jsonl"
    process = start(*flags, "--output", output, cwd=tmp_path)
    wait_for_lines(process, partial, 2)
    process.send_signal(number)
    message = process.communicate()[1]
    assert process.returncode == status and "Traceback" not in message
    done = partial.read_bytes().count(b"\n")
    assert f"{done} of 80 records are in {partial}" in message
    again = run(*flags, "--output", output, cwd=tmp_path)
    assert_refused(again, f"{partial}: holds {done} records", f"to begin anew: rm '{partial}'")
    [command] = [line.partition("after them: ")[2] for line in again.stderr.splitlines()[1:2]]
    assert command in message and command.endswith("--resume")
    other = run(*flags, "--output", output, "--resume", "--max-length", 7, cwd=tmp_path)
    assert_refused(other, "--max-length: was 100, now it is 7")
    finished = subprocess.run(
        shlex.split(command), cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert f"resuming after {done} records" in finished.stderr
    assert len(read(output.read_text("utf-8"))) == 80
    assert sorted(folder.iterdir()) == [folder / "in.jsonl", output]


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
        *("--resume", "--escape"),
        *("--max-length", "--repetition-penalty", "--repetition-window", "--dtype", "--device"),
    ):
        assert flag in done.stdout


MODEL = ("--load", ROOT / "src" / "ckpts" / "cpm-bee-tiny")
POEM = {"input": "春天", "o": {"<option_0>": "春眠不觉晓", "<option_1>": "千山鸟飞绝"}}


def test_kept_fields_and_options_of_a_file(tmp_path):
    records = [{"id": i, **POEM, "<ans>": "<option_0>"} for i in (7, 8)]
    source = write(tmp_path / "in.jsonl", records)
    flags = ("--input", source, "--output", "-", "--keep", "id", "--choices", "average-orders", 2)
    done = run(*MODEL, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = read(done.stdout)
    assert [result["id"] for result in results] == [7, 8]
    for result in results:
        assert sum(result["<choices>"].values()) == pytest.approx(1)
        assert result["<ans>"] == max(result["<choices>"], key=result["<choices>"].get)
    assert "2 records written\nexact match: " in done.stderr
    done = run(*MODEL, *flags, "--abstain-below", 1, cwd=tmp_path)
    assert [result["<ans>"] for result in read(done.stdout)] == [None, None]
    assert "abstained: 2 records" in done.stderr


def test_a_prompt(tmp_path):
    done = run(*MODEL, "--prompt", json.dumps(POEM), "--choices", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in ("<option_0> 春眠不觉晓", "<option_1> 千山鸟飞绝")
    plain = run(*MODEL, "--prompt", "春天", "--max-length", 5, cwd=tmp_path)
    streamed = run(*MODEL, "--prompt", "春天", "--max-length", 5, "--stream", cwd=tmp_path)
    assert plain.returncode == streamed.returncode == 0
    assert plain.stdout == streamed.stdout != ""
    assert_refused(
        run("--prompt", '{"input": 3}', "--load", "none", cwd=tmp_path), "value of /input"
    )
    assert_refused(run(*MODEL, cwd=tmp_path), "nothing to answer")
