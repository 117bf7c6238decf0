"""The benchmarks of quantized models, in sizes of seconds; and the commands that they stand for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import support
import torch

from cpm_bee.checkpoint.reader import load_tensors

BASE = support.ROOT / "src" / "ckpts" / "cpm-bee-tiny"
SIZES = {
    "vocab_size": 9000,  # more than the tiny base's vocabulary: it is filled up
    "dim_model": 64, "num_heads": 2, "dim_head": 32, "dim_ff": 128, "num_layers": 2,
    "half": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(SIZES))
    return path


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, str(support.ROOT / script), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )


def tenb(work: Path, config: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return run("benchmarks/tenb.py", "--work", work, "--config", config, "--steps", 2, *flags)


def results(work: Path) -> dict[str, Any]:
    return json.loads((work / "results.json").read_text(encoding="utf-8"))["phases"]


@pytest.mark.slow
def test_the_10b_benchmark_goes_on_where_it_was_cut_off(config: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert tenb(work, config, "--until", "quantize").returncode == 0
    first = results(work)
    assert list(first) == ["checkpoint", "quantize"]
    checkpoint = work / "checkpoint" / "pytorch_model.bin"
    tensors = load_tensors(checkpoint, "a checkpoint")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    w = tensors["encoder.layers.1.ffn.ffn.w_out.weight"].float()
    assert abs(w.mean()) < 0.05 and abs(w.std() - 1) < 0.05
    del tensors

    done = tenb(work, config)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = results(work)
    assert list(whole) == ["checkpoint", "quantize", "train", "generate"]
    assert {name: whole[name] for name in first} == first  # not run again
    losses = whole["train"]["losses"]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert whole["train"]["tokens"] > 150
    assert 0.1 < whole["train"]["peak_gigabytes"] < 1
    assert "answer" in whole["generate"]
    assert not list(checkpoint.parent.iterdir())  # the weights are removed

    assert tenb(work, config, "--lr", 1e-9).returncode == 2  # results of other settings


@pytest.mark.slow
def test_the_10b_benchmark_fails_where_a_target_is_missed(config: Path, tmp_path: Path) -> None:
    done = tenb(tmp_path, config, "--limit", 0.001, "--until", "checkpoint")
    assert done.returncode == 1
    assert "MORE THAN 0.001 GB" in done.stdout


@pytest.mark.slow
def test_qlora_quality(tmp_path: Path) -> None:
    data = tmp_path / "bee.jsonl"
    work = run("tutorials/basic_task_finetune/data_reformat.py", "--input",
               support.ROOT / "raw_data" / "train.jsonl", "--output", tmp_path)  # fmt: skip
    assert work.returncode == 0, work.stderr
    data = tmp_path / "train.jsonl"
    flags = ("--data", data, "--vocab", BASE / "vocab.txt", "--model", "256x4")
    flags += ("--steps", 12, "--max-length", 512, "--window", 6, "--lr", 3e-4)
    done = run("benchmarks/qlora_quality.py", *flags, "--limit", 0.06)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = ([float(v) for v in line.split()[1:]] for line in done.stdout.splitlines()[1:3])
    assert last[0] < first[0] and last[1] < first[1]
    # A limit that nothing can keep is told.
    assert run("benchmarks/qlora_quality.py", *flags, "--limit", 1e-7).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_generation_on_a_quantized_base(tmp_path: Path, kind: str) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    record = {"input": "边关，菊花开了。", "question": "q", "<ans>": ""}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    flags = ["--load", model, "--input", tmp_path / "in.jsonl", "--output", "-", "--max-length", 5]
    for _ in range(2):
        done = run("src/text_generation.py", *flags, "--quantize", kind)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout).keys() == record.keys()  # messages go elsewhere
        assert (model / f"pytorch_model.{kind}.safetensors").is_file()
    assert "quantizing" not in done.stderr
