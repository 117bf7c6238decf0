"""The committed base model: what it is, and that tuning it on the sample works."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, RunScript

from cpm_bee.model.config import ModelConfig
from cpm_bee.pretrained import load_pretrained

TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"
RECIPE = ROOT / "scripts" / "tiny_base"


def test_it_is_small_and_in_the_native_format() -> None:
    files = sorted(path.name for path in TINY.iterdir())
    assert files == ["config.json", "pytorch_model.bin", "vocab.txt"]
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8 << 20
    base = load_pretrained(str(TINY), "auto", None, torch.float32, torch.device("cpu"))
    assert base.model.config == ModelConfig.load(TINY / "config.json")
    assert base.model.config == ModelConfig.load(ROOT / "config" / "cpm-bee-tiny.json")
    tensors = torch.load(TINY / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_its_vocabulary_is_what_the_script_builds(tmp_path: Path, run_script: RunScript) -> None:
    done = run_script("scripts/tiny_base/build_vocabulary.py", "--output", tmp_path / "vocab.txt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vocab.txt").read_bytes() == (TINY / "vocab.txt").read_bytes()


def test_its_training_log_is_there_and_fits_the_recipe() -> None:
    lines = (RECIPE / "training-log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    words, lines_stage = events[: starts[1]], events[starts[1] :]
    assert words[0]["options"]["load"] is None
    assert lines_stage[0]["options"]["load"].endswith("words/results/cpm-bee-tiny-last.pt")
    recipe = (RECIPE / "recipe.sh").read_text(encoding="utf-8").split()
    for stage in (words, lines_stage):
        assert stage[-1]["event"] == "end"
        options = stage[0]["options"]
        assert not options["use_delta"]
        for flag in ("lr", "seed", "train-iters", "max-steps", "max-length", "batch-size"):
            values = [b for a, b in itertools.pairwise(recipe) if a == f"--{flag}"]
            assert options[flag.replace("-", "_")] in map(float, values)
    evaluations = [event["exact_match"] for event in words if event["event"] == "eval"]
    assert evaluations[0] < 0.05
    assert evaluations[-1] > 0.99


@pytest.mark.slow
def test_tuning_lifts_the_accuracy_on_the_sample(tmp_path: Path) -> None:
    """With the settings of the script, from at most 40 % to at least 85 %."""
    bee, results = tmp_path / "bee", tmp_path / "bin"
    reformat = ["tutorials/basic_task_finetune/data_reformat.py", "--output", bee]
    preprocess = ["src/preprocess_dataset.py", "--input", bee, "--output_path", results]
    preprocess += ["--output_name", "data"]
    for script, *arguments in (reformat, preprocess):
        subprocess.run([sys.executable, ROOT / script, *arguments], check=True)
    subprocess.run(
        ["bash", "scripts/finetune_cpm_bee.sh"],
        cwd=ROOT / "src",
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "LOAD": "ckpts/cpm-bee-tiny",
            "DATASET": str(results / "train"),
            "EVAL_DATASET": str(results / "eval"),
            "SAVE": str(tmp_path),
            "SAVE_NAME": "tuned",
        },
        check=True,
    )
    log = (tmp_path / "tuned-log.jsonl").read_text(encoding="utf-8").splitlines()
    accuracies = [e["exact_match"] for e in map(json.loads, log) if e["event"] == "eval"]
    assert accuracies[0] <= 0.40
    assert max(accuracies) >= 0.85
