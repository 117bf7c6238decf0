"""kill -9 at 30 random moments of training, preprocessing, the token index and quantizing.

The same command, started again, ends with the same files bit for bit. After each kill, every file
that has its final name is whole.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import train_support
from support import ROOT
from train_support import Run, Workspace

from cpm_bee.data.bin_dataset import BinaryDataset

SEED = 9
NAME = "cpm_bee_finetune"
STEPS = 12
FINETUNE, PREPROCESS = (
    str(ROOT / "src" / f"{n}.py") for n in ("finetune_cpm_bee", "preprocess_dataset")
)
TRAINING: dict[str, dict[str, Any]] = {
    "delta": {"use_delta": True, "delta_dropout": 0.1, "save_interval": 2},
    "full": {"lr": 0.003, "save_interval": 1, "save_total_limit": 3},
    "quantized": {"use_delta": True, "quantize": "int8", "save_interval": 3, "save_total_limit": 1},
}

MAKE_INDEX = """
import sys
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.tokenizer import Tokenizer
TokenIndex.of(BinaryDataset(sys.argv[1]), Tokenizer.load(sys.argv[2]))
"""
QUANTIZE = """
import sys, torch
from cpm_bee.pretrained import load_pretrained
cpu = torch.device("cpu")
load_pretrained(sys.argv[1], "auto", None, torch.float32, cpu, quantize=sys.argv[2])
"""

Check = Callable[[], None]


class Commands:
    """Runs Python with arguments, and kills it. What it prints is in a file."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output of the commands"
        self._environment = train_support.environment(PYTHONPATH=str(ROOT / "src"))

    def run(self, command: list[str], delay: float | None = None) -> int:
        """Run a command, killed after so many seconds; returns its exit status."""
        with open(self._output, "ab") as output:
            process = forked.Popen(
                [sys.executable, *command], stdout=output, stderr=output, env=self._environment
            )
        if delay is not None:
            time.sleep(delay)
            process.kill()
        return process.wait()

    def complete(self, command: list[str]) -> float:
        """Run a command to its end; returns the seconds that it took."""
        started = time.monotonic()
        assert self.run(command) == 0, self._output.read_text(encoding="utf-8")[-3000:]
        return time.monotonic() - started


def files_in(folder: Path) -> dict[str, bytes]:
    """The files under a folder by path, without hidden ones and those in hidden folders."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    relative = {str(path.relative_to(folder)): path for path in paths}
    return {
        n: p.read_bytes() for n, p in relative.items() if not n.startswith(".") and "/." not in n
    }


def kill_in_turn(
    commands: Commands,
    command: list[str],
    kills: int,
    seconds: float,
    rng: random.Random,
    check: Check,
    check_end: Check,
    begin: Check,
) -> int:
    """Kill a command that often at random moments, start it again each time, and let it end.

    Whenever it has ended before its kill, it begins once more. Returns the number of kills.

    Args:
        seconds: the time that the command takes from its beginning to its end.
        check: after a kill.
        check_end: when it has ended.
        begin: prepares the first start.
    """
    begin()
    seconds /= 2  # later starts have less left to do
    killed = 0
    while killed < kills:
        started = time.monotonic()
        if commands.run(command, rng.uniform(0, seconds)) == -signal.SIGKILL:
            check()
            killed += 1
        else:
            seconds = min(seconds, time.monotonic() - started)
            check_end()
            begin()
    commands.complete(command)
    check_end()
    return killed


def kill_training(
    commands: Commands,
    workspace: Workspace,
    folder: Path,
    values: dict[str, Any],
    kills: int,
    rng: random.Random,
) -> int:
    model = folder / "model"
    flags = {
        "load": model, "eval_dataset": workspace.eval, "eval_interval": 4, "epoch": 9,
        "max_steps": STEPS, "save_minutes": 0.01, **values,
    }  # fmt: skip
    save, whole, earlier = folder / "killed", folder / "whole", folder / "earlier"
    shutil.copytree(workspace.model, model)
    # A finished run of the same name: a kill may meet the moves that keep it.
    commands.complete([FINETUNE, *workspace.flags(earlier, **{**flags, "seed": 8, "max_steps": 1})])
    kept = files_in(earlier)
    seconds = commands.complete([FINETUNE, *workspace.flags(whole, **flags)])
    expected = files_in(whole)
    cache = files_in(model)

    def begin() -> None:
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(earlier, save)
        shutil.rmtree(model)
        shutil.copytree(workspace.model, model)

    def check() -> None:
        for path in save.glob("*.pt"):
            torch.load(path, weights_only=True)
        for path in save.glob("*.json"):
            json.loads(path.read_text())
        log = save / f"{NAME}-log.jsonl"
        for line in log.read_text(encoding="utf-8").splitlines()[:-1] if log.exists() else ():
            json.loads(line)
        assert files_in(model).items() <= cache.items()
        steps = [
            torch.load(p, weights_only=True)["progress"]["step"]
            for p in save.glob(f"{NAME}-state*")
        ]
        assert len(steps) <= values.get("save_total_limit", 2) + 1
        assert steps or log_steps(log) == []  # from the first step on there is a state
        places = (save, save / f"{NAME}-previous", save / f".{NAME}-incoming")
        left = [path.read_bytes() for place in places for path in place.glob("cpm*.*")]
        assert all(content in left for content in kept.values())

    def check_end() -> None:
        found = files_in(save)
        weights = [name for name in expected if name.endswith(("-best.pt", "-last.pt"))]
        assert len(weights) == 2
        assert {name: found[name] == expected[name] for name in weights} == dict.fromkeys(
            weights, True
        )
        assert files_in(model) == cache
        assert files_in(save / f"{NAME}-previous") == kept
        run, reference = Run(save), Run(whole)
        assert run.column("step") == list(range(1, STEPS + 1))
        assert run.losses == reference.losses
        for column in ("step", "loss", "exact_match"):
            assert run.column(column, "eval") == reference.column(column, "eval")

    command = [FINETUNE, *workspace.flags(save, resume="auto", **flags)]
    return kill_in_turn(commands, command, kills, seconds, rng, check, check_end, begin)


def log_steps(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [line for line in text.splitlines() if '"event": "train"' in line]


def kill_writing(
    commands: Commands,
    command: Callable[[Path], list[str]],
    folder: Path,
    kills: int,
    rng: random.Random,
    prepare: Callable[[Path], None],
) -> int:
    """Kill a command that adds files to a folder; what it adds, it adds all at once or not at all.

    Returns the number of kills.

    Args:
        command: the command, for a folder.
        prepare: fills the folder.
    """
    whole, killed = folder / "whole", folder / "killed"
    prepare(whole)
    prepare(killed)
    before = files_in(killed)
    seconds = commands.complete(command(whole))
    after = files_in(whole)
    assert after != before

    def check() -> None:
        assert files_in(killed) in (before, after)

    def check_end() -> None:
        assert files_in(killed) == after

    def begin() -> None:
        shutil.rmtree(killed, ignore_errors=True)
        prepare(killed)

    return kill_in_turn(commands, command(killed), kills, seconds, rng, check, check_end, begin)


def preprocess(
    records: Path, vocabulary: Path, workers: int, *more: str
) -> Callable[[Path], list[str]]:
    flags = {"--input": records, "--output-name": "data", "--vocab": vocabulary}
    flags |= {"--workers": workers, "--block-size": 1 << 20}
    text = [str(part) for pair in flags.items() for part in pair]
    return lambda folder: [PREPROCESS, *text, "--output-path", str(folder), *more]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    with train_support.one_thread():
        return train_support.make_workspace(tmp_path_factory.mktemp("workspace"), dropout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("delta", 6), ("full", 5), ("quantized", 3)])
def test_training(
    commands: Commands, workspace: Workspace, tmp_path: Path, kind: str, kills: int
) -> None:
    rng = random.Random(f"{SEED}/{kind}")
    assert kill_training(commands, workspace, tmp_path, TRAINING[kind], kills, rng) == kills


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing(
    commands: Commands, workspace: Workspace, tmp_path: Path, workers: int
) -> None:
    rng = random.Random(f"{SEED}/{workers}")
    assert kill_preprocessing(commands, workspace, tmp_path, workers, [2, 2], rng) == 4


def kill_preprocessing(
    commands: Commands,
    workspace: Workspace,
    folder: Path,
    workers: int,
    kills: list[int],
    rng: random.Random,
) -> int:
    """Kill it while it makes a dataset, and then while it replaces one."""
    records = folder / "many.jsonl"
    train_support.write_jsonl(records, train_support.records(1500, seed=4))
    command = preprocess(records, workspace.vocabulary, workers)
    killed = kill_writing(commands, command, folder / "new", kills[0], rng, lambda path: None)

    def prepare(path: Path) -> None:
        train_support.make_dataset(path, "few", train_support.records(40, seed=5))
        (path / "bin_data" / "few").rename(path / "many")
        shutil.rmtree(path / "bin_data")
        (path / "few.jsonl").unlink()

    command = preprocess(records, workspace.vocabulary, workers, "--overwrite")
    return killed + kill_writing(commands, command, folder / "old", kills[1], rng, prepare)


@pytest.mark.slow
def test_the_token_index(commands: Commands, workspace: Workspace, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED}/index")
    assert kill_index(commands, workspace, tmp_path, 4, rng) == 4


def kill_index(
    commands: Commands, workspace: Workspace, folder: Path, kills: int, rng: random.Random
) -> int:
    train_support.make_dataset(folder, "many", train_support.records(2000, seed=4))
    made = folder / "bin_data" / "many"

    def command(path: Path) -> list[str]:
        return ["-c", MAKE_INDEX, str(path / "many"), str(workspace.vocabulary)]

    def prepare(path: Path) -> None:
        shutil.copytree(made, path / "many")

    killed = kill_writing(commands, command, folder, kills, rng, prepare)
    assert len(BinaryDataset(folder / "killed" / "many")) == 2000
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantizing(commands: Commands, tmp_path: Path, kind: str) -> None:
    assert kill_quantizing(commands, tmp_path, kind, 2, random.Random(f"{SEED}/{kind}")) == 2


def kill_quantizing(
    commands: Commands, folder: Path, kind: str, kills: int, rng: random.Random
) -> int:
    sizes = {"dim_model": 256, "dim_ff": 512, "dim_head": 32, "num_heads": 8, "num_layers": 6}
    train_support.make_model(folder / "model", replace(train_support.CONFIG, **sizes))

    def prepare(path: Path) -> None:
        shutil.copytree(folder / "model", path)

    def command(path: Path) -> list[str]:
        return ["-c", QUANTIZE, str(path), kind]

    return kill_writing(commands, command, folder, kills, rng, prepare)
