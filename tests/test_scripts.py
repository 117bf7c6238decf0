"""The shell scripts, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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
    assert "ckpts/pytorch_model.bin does not exist" in done.stdout
    results = checkout / "src" / "results"
    assert (results / "cpm_bee_finetune-delta-best.pt").is_file()
    assert (results / "cpm_bee_finetune-delta-last.pt").is_file()
    events = read_log(results / "cpm_bee_finetune-log.jsonl")
    evaluation = ["eval", "samples"]
    kinds = [e["event"] for e in events]
    steps = ["digest", "train", "digest", "train", "digest"]
    assert kinds == ["start", *evaluation, *steps, *evaluation, "end"]
    assert events[1]["records"] == 20
    written = sorted(p.name for p in (checkout / "bin_data" / "train").iterdir())
    assert written[:3] == ["ccpm_data", "checksums.json", "meta.bin"]
    assert not list(checkout.rglob("tmp"))


@pytest.mark.slow
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
    assert "does not exist" not in done.stdout
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
    assert "torchrun" not in done.stdout + done.stderr  # one process needs none
    assert not (checkout / "src" / "results").exists()


NOTING = """
import json, os, signal, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_WAIT_POLICY")
with open("calls.jsonl", "a") as file:
    noted = {n: os.environ.get(n) for n in names}
    noted["ignores SIGHUP"] = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    file.write(json.dumps([sys.argv[1:], noted]) + "\\n")
sys.exit(3 if "--wrong" in sys.argv else 0)
"""


@pytest.fixture
def calls(checkout: Path) -> Callable[..., tuple[subprocess.CompletedProcess, list]]:
    """Run finetune_cpm_bee.sh with a finetune_cpm_bee.py that notes how it is called."""
    (checkout / "src" / "finetune_cpm_bee.py").write_text(NOTING)

    def run(*flags: str, **settings: str) -> tuple[subprocess.CompletedProcess, list]:
        noted = checkout / "src" / "calls.jsonl"
        noted.write_text("")
        done = bash("scripts/finetune_cpm_bee.sh", *flags, cwd=checkout / "src", **settings)
        return done, read_log(noted)

    return run


def test_one_process_is_started_without_torchrun(calls: Callable) -> None:
    done, noted = calls("--wrong")
    assert done.returncode == 3
    ((flags, environment),) = noted
    assert "--dry-run" not in flags
    assert environment["WORLD_SIZE"] is None and environment["OMP_WAIT_POLICY"] == "PASSIVE"
    done, noted = calls(OMP_WAIT_POLICY="ACTIVE")
    assert done.returncode == 0 and noted[0][1]["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("flags", [["--config", "run.yaml"], ["--config=run.yaml"]])
def test_a_file_of_settings_gets_no_defaults(calls: Callable, flags: list[str]) -> None:
    assert calls(*flags)[1][0][0] == flags
    given = {"LOAD": "m", "DATASET": "d", "EVAL_DATASET": "e", "LR": "0.1", "USE_DELTA": "1"}
    assert calls(*flags, MODEL_CONFIG="c", VOCAB="v", **given)[1][0][0] == [
        *("--model-config", "c", "--load", "m", "--dataset", "d", "--eval_dataset", "e"),
        *("--lr", "0.1", "--use-delta", "--vocab", "v", *flags),
    ]


def test_several_processes_start_after_one_dry_run(calls: Callable) -> None:
    ((flags, environment),) = calls("--wrong", GPUS_PER_NODE="3")[1]
    assert flags[-2:] == ["--wrong", "--dry-run"]
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "3")
    done, (dry, *others) = calls("--delta-rank", "2", GPUS_PER_NODE="3")
    assert done.returncode == 0, done.stderr
    assert dry[0] == [*others[0][0], "--dry-run"]
    assert sorted(environment["RANK"] for _, environment in others) == ["0", "1", "2"]
    assert not any(environment["ignores SIGHUP"] for _, environment in others)
    assert len(calls("--dry-run", GPUS_PER_NODE="3")[1]) == 1
    for flags in (["--resume"], ["--resume", "auto"], ["--resume", "--delta-rank", "2"]):
        (dry, _) = calls(*flags, "--wrong", GPUS_PER_NODE="3")[1][0]
        assert dry[-len(flags) - 2 :] == [*flags, "--wrong", "--dry-run"]


@pytest.mark.slow
def test_under_nohup_no_process_listens_to_sighup(calls: Callable) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the script inherits, as from nohup
    try:
        done, noted = calls(GPUS_PER_NODE="2")
    finally:
        signal.signal(signal.SIGHUP, old)
    assert len(noted) == 3 and all(environment["ignores SIGHUP"] for _, environment in noted)
    assert "--signals_to_handle=SIGTERM,SIGINT,SIGQUIT" in done.stdout


def test_several_processes_stop_at_a_mistake_before_torchrun(calls: Callable) -> None:
    done, noted = calls("--wrong", GPUS_PER_NODE="2")
    assert done.returncode == 3 and len(noted) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done, noted = calls(GPUS_PER_NODE="2", MASTER_PORT=port)
    assert done.returncode == 2 and len(noted) == 1
    assert done.stderr.startswith(f"error: MASTER_PORT={port}: address already in use")
    for name, value in (("MASTER_PORT", "high"), ("GPUS_PER_NODE", "all"), ("NNODES", "0")):
        done, _ = calls(**{"GPUS_PER_NODE": "2", name: value})
        assert done.returncode == 2 and f"{name}={value}" in done.stderr
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


FAKE_TORCHRUN = """#!/usr/bin/env bash
for flag in "$@"; do
    case "$flag" in --log-dir=*) mkdir -p "${flag#*=}/attempt_0" ;; esac
done
[ -z "${KEEP_RUNNING:-}" ] || exec sleep 600
"""


def test_folders_of_ended_torchruns_are_removed(checkout: Path, tmp_path: Path) -> None:
    (checkout / "src" / "finetune_cpm_bee.py").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text(FAKE_TORCHRUN)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    temporary = tmp_path / "tmp"
    for name in ("torchelastic_x", "cpm_bee-torchrun-elsewhere-1-1", "cpm_bee-torchrun-odd"):
        (temporary / name).mkdir(parents=True)
    others = set(temporary.iterdir())
    path = f"{tmp_path / 'bin'}{os.pathsep}{VENV_BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GPUS_PER_NODE": "2", "TMPDIR": str(temporary)}
    command = ["bash", "scripts/finetune_cpm_bee.sh"]

    def run(**settings: str) -> set[Path]:
        subprocess.run(command, cwd=checkout / "src", env={**environment, **settings}, check=True)
        return set(temporary.iterdir()) - others

    living = subprocess.Popen(
        command, cwd=checkout / "src", env={**environment, "KEEP_RUNNING": "1"}
    )
    try:
        while not (folders := set(temporary.iterdir()) - others):
            assert living.poll() is None
            time.sleep(0.05)
        (own,) = folders
        assert own.name.split("-")[-2] == str(living.pid)
        first = run()
        assert len(first) == 2 and own in first
        second = run()  # without that of the first run, which has ended by itself
        assert len(second) == 2 and own in second and not first - {own} & second
    finally:
        living.kill()
        living.wait()
    # The number of the process is another one's now, which began at another time.
    reused = temporary / f"{own.name.rpartition('-')[0].rpartition('-')[0]}-{os.getpid()}-1"
    reused.mkdir()
    left = run(GPUS_PER_NODE="1")
    assert left == set() and set(temporary.iterdir()) == others


def test_without_pytorch_the_script_says_what_to_do(checkout: Path) -> None:
    done = bash("scripts/finetune_cpm_bee.sh", cwd=checkout / "src", PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert "torchrun (PyTorch) is not installed" in done.stderr


@pytest.mark.slow
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
    begin = "error: this run cannot start: (explain: E201, E315)\n"
    assert done.stderr.startswith(f"{begin}  --load ckpts/pytorch_model.bin: no such checkpoint")
    assert done.stderr.count("error: ") == 1
    # Once more as the root cause in torchrun's report, which names rank 0.
    report = done.stderr.partition("Root Cause")[2]
    assert "rank      : 0 (local_rank: 0)" in report and "exitcode  : 2" in report
    assert done.stderr.count("--load ckpts/pytorch_model.bin: no such checkpoint") == 2
    assert str(checkout / "src" / "cpm_bee") not in done.stderr  # as in a traceback of ours
    assert not (checkout / "src" / "results").exists()


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
        assert "choice accuracy against the base model: " in done.stdout
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
