"""preprocess_dataset.py as a user runs it; the library: tests/data/preprocess/test_pipeline.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from preprocess_support import assert_same_index, bee_data, make, numbers, read, record, tree, write
from support import RunScript

import preprocess_dataset
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.writer import folder_name
from cpm_bee.errors import InputError
from cpm_bee.tokenizer import Tokenizer

SCRIPT = "src/preprocess_dataset.py"


@pytest.fixture
def bee(tmp_path: Path) -> Path:
    return bee_data(tmp_path)


# ------------------------------------------------------------------ as a user would


def test_a_folder(bee: Path, run_script: RunScript) -> None:
    (bee / "bee_data" / "notes.txt").write_text("no records")
    (bee / "bee_data" / ".train.jsonl").write_text("no records")
    (bee / "bee_data" / "folder.jsonl").mkdir()
    result = run_script(
        SCRIPT, "--input", "bee_data", "--output_path", "bin_data", "--output_name", "ccpm_data",
        "--vocab", "none", cwd=bee,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    files = {
        f"{name}/{file}"
        for name in ("train", "eval")
        for file in ("meta.bin", "checksums.json", "ccpm_data")
    }
    assert set(tree(bee / "bin_data")) == {"train", "eval", *files}
    assert "bin_data/train: 300 records" in result.stdout
    assert "bin_data/eval: 50 records" in result.stdout
    assert "bash scripts/finetune_cpm_bee.sh" in result.stdout
    assert (bee / "bin_data" / "train" / "ccpm_data").stat().st_size == 16 << 20
    for name, count in (("train", 300), ("eval", 50)):
        found = numbers(bee / "bin_data" / name)
        assert sorted(found) == list(range(count))
        assert found != list(range(count))
    assert {path.name for path in bee.iterdir()} == {"bee_data", "bin_data"}


def test_one_file_hyphens_and_options(bee: Path, run_script: RunScript) -> None:
    result = run_script(
        SCRIPT, "--input", "bee_data/eval.jsonl", "--output-path=a/b", "--output-name=data",
        "--seed", "5", "--block-size", "4096", "--vocab=none", "--workers=2", cwd=bee,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(tree(bee / "a" / "b")) == {
        "eval",
        "eval/meta.bin",
        "eval/checksums.json",
        "eval/data",
    }
    assert read(bee / "a" / "b" / "eval") == read(make(bee, seed=5) / "eval")
    assert BinaryDataset(bee / "a" / "b" / "eval").files[0].block_size == 4096


def test_help_imports_little(root: Path) -> None:
    """How quick it is: tests/test_package.py."""
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", str(root / SCRIPT), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "cpm_bee.cli" in imported
    assert "torch" not in imported
    assert "numpy" not in imported


def test_every_problem_of_every_file_is_listed_and_nothing_written(
    bee: Path, run_script: RunScript
) -> None:
    good = json.dumps(record(0), ensure_ascii=False)
    bad = ["{", '{"input": "a"}', '["a"]', '{"<ans>": "a<b", "n": 1}', '{"<ans>": "\\ud800"}']
    text = "\n".join([good, *bad, "", good]) + "\n"
    (bee / "bee_data" / "train.jsonl").write_text(text, encoding="utf-8")
    (bee / "bee_data" / "eval.jsonl").write_bytes(good.encode() + b"\n\xff\n")
    (bee / "bee_data" / "none.jsonl").write_text("\n\n")
    result = run_script(
        SCRIPT, "--input", "bee_data", "--output_path", "new/bin", "--output_name", "x", cwd=bee
    )
    assert (result.returncode, result.stdout) == (2, "")
    for expected in (
        "bee_data/train.jsonl:2: not valid JSON",
        'bee_data/train.jsonl:3: there is no "<ans>"',
        "bee_data/train.jsonl:4: a record is a JSON object, this is a list",
        "bee_data/train.jsonl:5: value of /<ans>: the special token that begins with '<'",
        "bee_data/train.jsonl:5: value of /n: expected text or an object, this is a number",
        "bee_data/train.jsonl:6: value of /<ans>: contains half of a surrogate pair",
        "bee_data/eval.jsonl:2: not UTF-8",
        "bee_data/none.jsonl: holds no records",
        "8 problems, nothing was written",
    ):
        assert expected in result.stderr
    assert "train.jsonl:1" not in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in bee.iterdir()} == {"bee_data"}


def test_a_dataset_that_exists(bee: Path, run_script: RunScript) -> None:
    make(bee)
    (bee / "bin" / "eval").rename(bee / "bin" / "other")
    before = tree(bee)
    arguments = ["--input", "bee_data", "--output_path", "bin", "--output_name", "ccpm_data"]
    # Found before any work: the input is not even read.
    write(bee / "bee_data" / "zzz.jsonl", 0)
    result = run_script(SCRIPT, *arguments, cwd=bee)
    (bee / "bee_data" / "zzz.jsonl").unlink()
    assert result.returncode == 2
    assert "ValueError: Dataset name exists: bin/train (explain: E206)\n" in result.stderr
    assert "--overwrite" in result.stderr
    assert "--output_path" in result.stderr
    assert "Traceback" not in result.stderr
    assert tree(bee) == before

    write(bee / "bee_data" / "train.jsonl", 20)
    result = run_script(SCRIPT, *arguments, "--overwrite", cwd=bee)
    assert result.returncode == 0, result.stderr
    assert sorted(numbers(bee / "bin" / "train")) == list(range(20))
    assert {path.name for path in (bee / "bin").iterdir()} == {"train", "eval", "other"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", "nothing"], "nothing: no such file or folder; expected *.jsonl"),
        (["--input", "empty"], "empty: looked for *.jsonl files of records, found none"),
        (["--output_name", "meta.bin"], "expected a file name other than meta.bin"),
        (["--output_name", "a/b"], "expected a file name"),
        (["--output_name", ".."], "expected a file name"),
        (["--output_name", ""], "expected a file name"),
        (["--output_path", "bee_data/train.jsonl"], "--output_path is a folder, this is a file"),
        (["--block-size", "0"], "0 is less than 1"),
        (["--block-size", "90"], "bee_data/train.jsonl:1: the record takes"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--out", "x"], "unrecognized arguments: --out"),
        (["--workers", "0"], "0 is less than 1"),
        (["--vocab", "nowhere.txt"], "nowhere.txt: no such vocabulary file"),
    ],
)
def test_wrong_usage(bee: Path, run_script: RunScript, arguments: list[str], expected: str) -> None:
    (bee / "empty").mkdir()
    before = tree(bee)
    usual = ["--input", "bee_data", "--output_path", "bin", "--output_name", "ccpm_data"]
    result = run_script(SCRIPT, *usual, *arguments, cwd=bee)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    if "*.jsonl" in expected:
        assert "python data_reformat.py" in result.stderr
    assert tree(bee) == before


def test_kill_9_in_the_middle_leaves_no_dataset(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "bee_data" / "train.jsonl", 60_000)
    arguments = ["--input", "bee_data", "--output_path", "bin", "--output_name", "ccpm_data"]
    command = [sys.executable, str(root / SCRIPT), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "bin" / ".train.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {".train.partial"}
    with pytest.raises(InputError):
        BinaryDataset(tmp_path / "bin" / "train")
    write(tmp_path / "bee_data" / "train.jsonl", 10)
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"train"}
    assert sorted(numbers(tmp_path / "bin" / "train")) == list(range(10))


# ------------------------------------------------------------------ the token index


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(bee: Path, run_script: RunScript) -> None:
    write(bee / "bee_data" / "train.jsonl", 12_000)  # several chunks and buckets
    arguments = ["--input", "bee_data", "--output-name", "data", "--vocab"]
    arguments.append(str(tiny.write_vocabulary(bee / "vocab.txt")))
    made = []
    for workers in (1, 2, 3):
        output = f"bin{workers}"
        done = run_script(
            SCRIPT, *arguments, "--output-path", output, "--workers", workers, cwd=bee
        )
        assert (done.returncode, done.stderr) == (0, "")
        made.append(tree(bee / output))
    assert made[0] == made[1] == made[2]
    assert f"train/{folder_name(tiny.TOKENIZER)}/ids" in made[0]
    assert sorted(numbers(bee / "bin2" / "train")) == list(range(12_000))


def strange(bee: Path) -> None:
    with open(bee / "bee_data" / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"input": "<strange_1>", "<ans>": "a"}\n{"<ans>": "<other>"}\n')


def test_records_that_the_given_vocabulary_lacks(bee: Path, run_script: RunScript) -> None:
    vocabulary = tiny.write_vocabulary(bee / "vocab.txt")
    strange(bee)
    (bee / "bee_data" / "eval.jsonl").write_text("3\n")
    result = run_script(
        SCRIPT, "--input", "bee_data", "--output_path", "bin", "--output_name", "x",
        "--vocab", vocabulary, cwd=bee,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    for expected in (
        "bee_data/train.jsonl:301: special token <strange_1>: <strange> is not in the vocabulary",
        "bee_data/train.jsonl:302: special token <other>: <other> is not in the vocabulary",
        "bee_data/eval.jsonl:1: a record is a JSON object",
        "3 problems, nothing was written",
    ):
        assert expected in result.stderr
    assert {path.name for path in bee.iterdir()} == {"bee_data", "vocab.txt"}


def test_records_that_the_usual_vocabulary_lacks(bee: Path, run_script: RunScript) -> None:
    strange(bee)
    arguments = ["--input", "bee_data", "--output_name", "x", "--output_path"]
    result = run_script(SCRIPT, *arguments, "bin", cwd=bee)
    assert result.returncode == 0
    assert result.stderr.count("warning: ") == 1
    assert "no token index is made" in result.stderr
    assert "bee_data/train.jsonl:30" in result.stderr
    assert "--vocab FILE" in result.stderr
    result = run_script(SCRIPT, *arguments, "plain", "--vocab", "none", cwd=bee)
    assert (result.returncode, result.stderr) == (0, "")
    assert tree(bee / "bin") == tree(bee / "plain")
    assert len(read(bee / "bin" / "train")) == 302


def test_the_usual_vocabulary_is_that_of_the_base(
    root: Path, bee: Path, run_script: RunScript
) -> None:
    beside = root / "src" / "ckpts" / "vocab.txt"
    usual = beside if beside.exists() else beside.parent / "cpm-bee-tiny" / "vocab.txt"
    arguments = ["--input", "bee_data", "--output_path", "bin", "--output_name", "x"]
    result = run_script(SCRIPT, *arguments, cwd=bee)
    assert (result.returncode, result.stderr) == (0, "")
    assert_same_index(bee / "bin" / "eval", bee, Tokenizer.load(usual))


def test_the_next_command_keeps_the_results_of_other_tasks_apart(
    root: Path, tmp_path: Path
) -> None:
    usual = [root / "bin_data" / name for name in ("train", "eval")]
    assert preprocess_dataset.next_step(usual) == ("next, in src: bash scripts/finetune_cpm_bee.sh")
    own = [tmp_path / "my task" / name for name in ("eval", "train")]
    assert preprocess_dataset.next_step(own) == (
        f"next: cd {root / 'src'} && DATASET='{own[1]}' EVAL_DATASET='{own[0]}' "
        "SAVE_NAME='my task' bash scripts/finetune_cpm_bee.sh"
    )
