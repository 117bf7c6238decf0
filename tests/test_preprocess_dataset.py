from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from support import RunScript

from cpm_bee.data.container import BinaryDataset
from cpm_bee.data.preprocess import preprocess
from cpm_bee.errors import InputError
from cpm_bee.records import Record

SCRIPT = "src/preprocess_dataset.py"
BLOCK = 4096


def record(number: int) -> Record:
    return {"input": f"第{number}句", "options": {"<option_0>": "a << b"}, "<ans>": "<option_0>"}


def write(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record(i), ensure_ascii=False) + "\n" for i in range(count))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(folder: Path) -> list[Record]:
    dataset = BinaryDataset(folder)
    return [dataset.read(index, offset) for index, offset, _ in dataset]


def numbers(folder: Path) -> list[int]:
    return [int(str(item["input"])[1:-1]) for item in read(folder)]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.fixture
def bee(tmp_path: Path) -> Path:
    write(tmp_path / "bee_data" / "train.jsonl", 300)
    write(tmp_path / "bee_data" / "eval.jsonl", 50)
    return tmp_path


def make(place: Path, name: str = "bin", **options: object) -> Path:
    chosen: dict = {"seed": 1, "overwrite": False, "block_size": BLOCK, **options}
    preprocess(place / "bee_data", place / name, "ccpm_data", **chosen)
    return place / name


# ------------------------------------------------------------------ as a user would


def test_a_folder(bee: Path, run_script: RunScript) -> None:
    (bee / "bee_data" / "notes.txt").write_text("no records")
    (bee / "bee_data" / ".train.jsonl").write_text("no records")
    (bee / "bee_data" / "folder.jsonl").mkdir()
    result = run_script(
        SCRIPT, "--input", "bee_data", "--output_path", "bin_data", "--output_name", "ccpm_data",
        cwd=bee,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    files = {f"{name}/{file}" for name in ("train", "eval") for file in ("meta.bin", "ccpm_data")}
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
        "--seed", "5", "--block-size", "4096", cwd=bee,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(tree(bee / "a" / "b")) == {"eval", "eval/meta.bin", "eval/data"}
    assert read(bee / "a" / "b" / "eval") == read(make(bee, seed=5) / "eval")
    assert BinaryDataset(bee / "a" / "b" / "eval").files[0].block_size == 4096


def test_help_is_quick(root: Path, run_script: RunScript) -> None:
    begin = time.perf_counter()
    result = run_script(SCRIPT, "--help")
    assert time.perf_counter() - begin < 1
    assert result.returncode == 0
    assert "--output-name" in result.stdout
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", str(root / SCRIPT), "--help"],
        capture_output=True,
        text=True,
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
        "bee_data/train.jsonl:6: value of /<ans>: holds half of a surrogate pair",
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
    assert "ValueError: Dataset name exists: bin/train\n" in result.stderr
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


def test_overwrite_spares_what_is_no_dataset(bee: Path) -> None:
    (bee / "bin" / "train").mkdir(parents=True)
    (bee / "bin" / "train" / "thesis.txt").write_text("x")
    before = tree(bee)
    with pytest.raises(InputError, match="this is no dataset"):
        make(bee, overwrite=True)
    assert tree(bee) == before


def test_kill_9_in_the_middle_leaves_no_dataset(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "bee_data" / "train.jsonl", 60_000)
    arguments = ["--input", "bee_data", "--output_path", "bin", "--output_name", "ccpm_data"]
    command = [sys.executable, str(root / SCRIPT), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 30
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


# ------------------------------------------------------------------ the shuffling


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1000, 10])
def test_same_input_and_seed_same_bytes(bee: Path, bucket_bytes: int) -> None:
    first = tree(make(bee, "first", bucket_bytes=bucket_bytes))
    assert tree(make(bee, "second", bucket_bytes=bucket_bytes)) == first
    other = make(bee, "third", bucket_bytes=bucket_bytes, seed=2)
    assert tree(other)["train/ccpm_data"] != first["train/ccpm_data"]
    assert sorted(numbers(other / "train")) == list(range(300))


def test_the_name_of_the_file_plays_no_part(bee: Path) -> None:
    (bee / "bee_data" / "copy.jsonl").write_bytes((bee / "bee_data" / "eval.jsonl").read_bytes())
    made = tree(make(bee))
    assert made["copy/ccpm_data"] == made["eval/ccpm_data"]


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 500])
def test_every_place_is_equally_likely(
    tmp_path: Path, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, rounds = 30, 150
    # No waiting for the disk 150 times.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write(tmp_path / "bee_data" / "a.jsonl", count)
    total = [0.0] * count
    ordered = 0
    for seed in range(rounds):
        folder = make(tmp_path, f"bin{seed}", seed=seed, bucket_bytes=bucket_bytes)
        found = numbers(folder / "a")
        for place, number in enumerate(found):
            total[number] += place
        ordered += sum(b == a + 1 for a, b in itertools.pairwise(found))
    # The mean place has standard deviation 0.71 over 150 rounds: five of them.
    mean = (count - 1) / 2
    assert all(abs(places / rounds - mean) < 3.6 for places in total)
    # Neighbours stay neighbours with probability 1/30: 145 expected, standard deviation 12.
    assert 85 < ordered < 205


def test_memory_is_that_of_a_bucket(tmp_path: Path) -> None:
    path = write(tmp_path / "bee_data" / "train.jsonl", 6_000)
    size = path.stat().st_size
    tracemalloc.start()
    folder = make(tmp_path, bucket_bytes=size // 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size // 2
    assert sorted(numbers(folder / "train")) == list(range(6_000))
    assert set(tree(folder)) == {"train", "train/meta.bin", "train/ccpm_data"}
