"""src/evaluate.py as a user runs it, on a delta that a short fine-tuning made."""

import json
import os
import re
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
TINY = SRC / "ckpts" / "cpm-bee-tiny"
RECORDS = 40


def run(script, *arguments, cwd):
    return forked.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with records, a dataset of 40 of them, and a delta trained for 20 steps on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    reformat = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    made = run(reformat, "--input", ROOT / "raw_data", "--output", "bee", cwd=folder)
    assert not made.returncode, made.stderr
    lines = (folder / "bee" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few").mkdir()
    (folder / "few" / "eval.jsonl").write_text("".join(lines[:RECORDS]), encoding="utf-8")
    flags = ("--input", "few", "--output_path", "bin", "--output_name", "data")
    made = run(SRC / "preprocess_dataset.py", *flags, cwd=folder)
    assert not made.returncode, made.stderr
    flags = ("--dataset", "bin/eval", "--eval-dataset", "bin/eval", "--use-delta", "--lr", "0.01")
    sizes = ("--batch-size", "2", "--max-length", "512", "--max-steps", "20", "--epoch", "100")
    files = ("--load", TINY / "pytorch_model.bin", "--save", "out", "--save-name", "t")
    files += ("--report", "tables")
    made = run(SRC / "finetune_cpm_bee.py", *flags, *sizes, *files, cwd=folder)
    assert not made.returncode, made.stderr
    return folder


def evaluate(folder, *arguments):
    model = ("--load", TINY / "pytorch_model.bin", "--delta", "out/t-delta-last.pt")
    return run(SRC / "evaluate.py", *model, *arguments, cwd=folder)


@pytest.mark.slow
def test_training_evaluation_generation_and_choices_agree_to_the_record(trained):
    made = evaluate(trained, "--dataset", "few/eval.jsonl", "--output", "results", "--baseline")
    assert not made.returncode, made.stderr
    (samples_file,) = (trained / "results").glob("samples_eval_*.jsonl")
    samples = read(samples_file)
    assert len(samples) == RECORDS
    last = [event for event in read(trained / "out/t-log.jsonl") if event["event"] == "eval"][-1]
    first = next(event for event in read(trained / "out/t-log.jsonl") if event["event"] == "eval")
    correct = sum(sample["exact_match"] for sample in samples)
    assert correct / RECORDS == last["exact_match"]
    (results_file,) = (trained / "results").glob("results_*.json")
    results = json.loads(results_file.read_text(encoding="utf-8"))["results"]["eval"]
    assert results["exact_match,none"] == last["exact_match"]
    assert results["token_accuracy,none"] == pytest.approx(last["token_accuracy"])
    # The baseline is the model before the first step.
    difference = last["exact_match"] - first["exact_match"]
    assert results["exact_match_difference,none"] == pytest.approx(difference)
    flags = ("--input", "few/eval.jsonl", "--output", "answers.jsonl", "--beam-size", "1")
    model = ("--load", TINY / "pytorch_model.bin", "--delta", "out/t-delta-last.pt")
    made = run(SRC / "text_generation.py", *flags, *model, cwd=trained)
    assert not made.returncode, made.stderr
    for sample, written in zip(samples, read(trained / "answers.jsonl"), strict=True):
        assert sample["resps"] == [[written["<ans>"]]]
        assert sample["exact_match"] == (written["<ans>"] == sample["target"])
        assert sample["acc"] == (sample["choice"] == sample["target"])


@pytest.mark.slow
def test_the_report(trained):
    made = evaluate(
        trained,
        *("--dataset", "bin/eval", "--train-dataset", "few/eval.jsonl", "--errors", "2"),
        *("--by", "question", "--limit", "30"),
    )
    assert not made.returncode, made.stderr
    assert "on 30 records of bin/eval" in made.stdout
    for name in ("exact match", "choice accuracy", "token accuracy", "perplexity"):
        assert re.search(rf"^{name} +[\d.]+( %)? +[\d.]+ to [\d.]+ +30$", made.stdout, re.M)
    assert "<option_0>" in made.stdout and "right \\ given" in made.stdout
    assert made.stdout.count("loss ") == 2
    # The records of the dataset are those of the file, in another order.
    assert "warning: 30 records (100.0%) are near-duplicates" in made.stdout
    assert "written:" not in made.stdout


def test_the_same_records_in_any_order_have_the_same_figures(trained, tmp_path):
    lines = (trained / "few" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    one = evaluate(trained, "--dataset", "few/eval.jsonl")
    other = evaluate(trained, "--dataset", tmp_path / "turned.jsonl")

    def figures(made):
        return re.findall(r"^([a-z ]+?) {2,}([\d.]+(?: %)?)", made.stdout, re.M)

    assert figures(one) == figures(other) != []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dataset", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--dataset", "few/eval.jsonl", "--by", "genre"), "--by genre:"),
        (("--dataset", "none.jsonl"), "none of its 1 records has an answer"),
    ],
)
def test_bad_input(trained, arguments, expected):
    (trained / "none.jsonl").write_text('{"input": "a", "<ans>": ""}\n')
    made = evaluate(trained, *arguments)
    assert made.returncode == 2
    assert expected in made.stderr
    assert "Traceback" not in made.stderr


def test_a_baseline_needs_a_delta(tmp_path):
    made = run(SRC / "evaluate.py", "--dataset", "x", "--baseline", cwd=tmp_path)
    assert made.returncode == 2
    assert "--baseline: needs --delta" in made.stderr
