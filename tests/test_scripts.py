"""The shell scripts, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

VENV_BIN = str(Path(sys.executable).parent)
TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"


def bash(script: str, *arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess:
    """Run a script with this interpreter's torchrun first on the PATH; settings go to the
    environment."""
    environment = {**os.environ, "PATH": f"{VENV_BIN}{os.pathsep}{os.environ['PATH']}", **settings}
    environment.setdefault("OMP_NUM_THREADS", "2")
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the working tree's sources, with no results and no data but the sample."""
    place = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in ("src", "scripts", "config", "tutorials", "raw_data"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, place / name)
    for name in ("bee_data", "bin_data"):
        (place / name).mkdir()
    for path in (place / "src" / "ckpts").iterdir():
        if path.name != TINY.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def shorten(path: Path, lines: int) -> None:
    """Keep the first lines of a file."""
    text = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
    path.write_text("".join(text), encoding="utf-8")


def run_tutorial(checkout: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    """The five commands of the tutorial, from the places written."""
    tutorial = checkout / "tutorials" / "basic_task_finetune"
    for command in (
        ["data_reformat.py"],
        [
            "../../src/preprocess_dataset.py",
            "--input",
            "bee_data",
            "--output_path",
            "bin_data",
            "--output_name",
            "ccpm_data",
        ],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tutorial, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
    return bash("scripts/finetune_cpm_bee.sh", *flags, cwd=checkout / "src", **settings)


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tutorial_word_for_word(checkout: Path) -> None:
    shorten(checkout / "raw_data" / "train.jsonl", 60)
    shorten(checkout / "raw_data" / "eval.jsonl", 20)
    done = run_tutorial(checkout, "--max-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ckpts/pytorch_model.bin is not there" in done.stdout
    results = checkout / "src" / "results"
    assert (results / "cpm_bee_finetune-delta-best.pt").is_file()
    assert (results / "cpm_bee_finetune-delta-last.pt").is_file()
    events = read_log(results / "cpm_bee_finetune-log.jsonl")
    assert [e["event"] for e in events] == ["start", "eval", "train", "train", "eval", "end"]
    assert events[1]["records"] == 20
    written = sorted(p.name for p in (checkout / "bin_data" / "train").iterdir())
    assert written[:2] == ["ccpm_data", "meta.bin"]
    assert not list(checkout.rglob("tmp"))


def test_settings_come_from_the_environment(checkout: Path) -> None:
    (checkout / "src" / "ckpts" / "pytorch_model.bin").write_bytes(
        next(TINY.glob("pytorch_model.bin")).read_bytes()
    )
    shutil.copy(TINY / "vocab.txt", checkout / "src" / "ckpts" / "my_vocab.txt")
    shorten(checkout / "raw_data" / "train.jsonl", 30)
    shorten(checkout / "raw_data" / "eval.jsonl", 10)
    done = run_tutorial(
        checkout,
        "--delta-rank",
        "2",
        "--max-steps",
        "1",
        LOAD="ckpts/pytorch_model.bin",
        VOCAB="ckpts/my_vocab.txt",
        SAVE="elsewhere",
        SAVE_NAME="mine",
        LR="0.5",
        LR_DECAY_STYLE="constant",
        WARMUP_ITERS="0",
        GPUS_PER_NODE="2",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is not there" not in done.stdout
    events = read_log(checkout / "src" / "elsewhere" / "mine-log.jsonl")
    assert events[0]["world_size"] == 2
    assert [e["lr"] for e in events if e["event"] == "train"] == [0.5]
    note = checkout / "src" / "elsewhere" / "mine-delta-best.json"
    assert json.loads(note.read_text(encoding="utf-8"))["rank"] == 2


def test_an_error_ends_the_script_without_traceback(checkout: Path) -> None:
    done = bash("scripts/finetune_cpm_bee.sh", cwd=checkout / "src", DATASET="no/such/folder")
    assert done.returncode == 2
    assert "--dataset no/such/folder: no such folder" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (checkout / "src" / "results").exists()


def test_without_pytorch_the_script_says_what_to_do(checkout: Path) -> None:
    done = bash("scripts/finetune_cpm_bee.sh", cwd=checkout / "src", PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert "torchrun (PyTorch) is not installed" in done.stderr


def test_copied_script_with_four_processes_and_no_checkpoint(checkout: Path) -> None:
    script = checkout / "src" / "copied.sh"
    flags = (
        "--use-delta --model-config config/cpm-bee-10b.json "
        "--dataset ../tutorials/basic_task_finetune/bin_data/train "
        "--eval_dataset ../tutorials/basic_task_finetune/bin_data/eval --epoch 5 --batch-size 5 "
        "--train-iters 100 --save-name cpm_bee_finetune --max-length 2048 --save results/ "
        "--lr 0.0001 --inspect-iters 100 --warmup-iters 1. --eval-interval 1000 "
        "--early-stop-patience 5 --lr-decay-style noam --weight-decay 0.01 --clip-grad 1.0 "
        "--loss-scale 32768 --start-step 0 --load ckpts/pytorch_model.bin"
    )
    script.write_text(
        "torchrun --nnodes=1 --nproc_per_node=4 --rdzv_id=1 --rdzv_backend=c10d "
        f"--rdzv_endpoint=localhost:0 finetune_cpm_bee.py {flags}\n"
    )
    for name in ("train", "eval"):
        (checkout / "bin_data" / name).mkdir()
    done = bash("copied.sh", cwd=checkout / "src", TMPDIR=str(checkout))
    assert done.returncode != 0
    assert done.stderr.count("--load ckpts/pytorch_model.bin: no such checkpoint") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (checkout / "src" / "results").exists()
    assert not list(checkout.glob("torchelastic_*"))


@pytest.mark.slow
def test_quickstart_on_own_data_and_again(checkout: Path, tmp_path: Path) -> None:
    """With the environment of this run as .venv: installing is CI's own first step."""
    bin_folder = checkout / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "pip", "torchrun"):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{VENV_BIN}/{name}" "$@"\n')
        (bin_folder / name).chmod(0o755)
    inputs = b"".join((checkout / n).read_bytes() for n in ("pyproject.toml", "constraints.txt"))
    stamp = subprocess.run(["cksum"], input=inputs, capture_output=True).stdout.decode().strip()
    (checkout / ".venv" / ".installed-base").write_text(stamp)
    own = tmp_path / "own"
    own.mkdir()
    for name, lines in (("train", 40), ("eval", 12)):
        shutil.copy(ROOT / "raw_data" / f"{name}.jsonl", own)
        shorten(own / f"{name}.jsonl", lines)
    for _ in range(2):
        done = bash(
            str(checkout / "scripts" / "quickstart.sh"),
            "--max-steps",
            "2",
            cwd=tmp_path,
            RAW_DATA="own",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "before tuning" in done.stdout
        assert "after tuning" in done.stdout
        assert done.stdout.count("  -> ") == 3
        assert (checkout / "src" / "results" / "own" / "own-delta-best.pt").is_file()
    assert (checkout / "src" / "results" / "own" / "own-previous").is_dir()


def test_quickstart_names_what_is_missing(checkout: Path, tmp_path: Path) -> None:
    done = bash(str(checkout / "scripts" / "quickstart.sh"), cwd=tmp_path, RAW_DATA="nowhere")
    assert done.returncode == 2
    assert "RAW_DATA=nowhere: no such folder" in done.stderr
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.jsonl").touch()
    done = bash(str(checkout / "scripts" / "quickstart.sh"), cwd=tmp_path, RAW_DATA="half")
    assert done.returncode == 2
    assert "half/eval.jsonl is missing" in done.stderr
