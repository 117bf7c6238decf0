"""Two processes under torchrun (gloo) do what one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import train_support
from train_support import Run, Workspace, distance, free_port, train

from cpm_bee.data.container import BinaryDataset
from cpm_bee.data.index import TokenIndex
from cpm_bee.data.planning import Plan
from cpm_bee.tokenizer import Tokenizer

ROWS = 4
MAX_LENGTH = 48  # so that lanes end at different steps

# name -> what both runs have, and what those of one and of two processes have besides
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "delta": ({"use_delta": True}, {"batch_size": ROWS}, {"batch_size": ROWS // 2}),
    "accumulate": (
        {"use_delta": True, "max_tokens": 40},  # batches in different numbers
        {"batch_size": ROWS},
        {"batch_size": ROWS // 4, "accumulate": 2},
    ),
    "full": ({"lr": 0.003}, {"batch_size": ROWS}, {"batch_size": ROWS // 2}),
}


def seed_with_an_idle_process(workspace: Workspace) -> int:
    """A seed whose first epoch ends with a step in which a process has no row."""
    index = TokenIndex.of(BinaryDataset(workspace.train), Tokenizer.load(workspace.vocabulary))
    for seed in range(100):
        plan = Plan(np.asarray(index.lengths), rows=ROWS, max_length=MAX_LENGTH, shuffle_seed=seed)
        last = list(plan.steps(0, range(ROWS)))[-1]
        if not any(last[0::2]) or not any(last[1::2]):
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def seed(workspace: Workspace) -> int:
    return seed_with_an_idle_process(workspace)


@pytest.fixture(scope="module")
def two(workspace: Workspace, seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two processes, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("two-processes")
    commands = []
    for name, (common, _, own) in RUNS.items():
        flags = {**settings(workspace, seed), **common, **own}
        commands.append(workspace.flags(folder / name, **flags))
    with train_support.one_thread():  # goes on with the state of one process
        common, alone, own = RUNS["delta"]
        flags = {**settings(workspace, seed), **common}
        train(workspace, folder / "resumed", **flags | alone | {"max_steps": 4})
        shutil.copytree(folder / "resumed", folder / "of-one-process")
    commands.append(workspace.flags(folder / "resumed", **flags | own | {"resume": True}))
    (folder / "commands.json").write_text(json.dumps([[free_port(), c] for c in commands]))
    script = support.ROOT / "tests" / "train_support.py"
    command = train_support.command(str(folder / "commands.json"), ranks=2, script=script)
    values = {"PYTHONPATH": str(support.ROOT / "src"), "TMPDIR": str(folder)}
    process = train_support.start(command, folder, **values)
    status, output, errors = train_support.finish(process)
    assert status == 0, errors
    assert output.count("engine torch, 2 process(es)") == len(RUNS) + 1  # by rank 0 alone
    return folder


def settings(workspace: Workspace, seed: int) -> dict[str, Any]:
    return {
        "eval_dataset": workspace.eval, "eval_interval": 5, "seed": seed, "epoch": 2,
        "max_steps": 16, "max_length": MAX_LENGTH,
    }  # fmt: skip


def compare(one: Run, two: Run) -> None:
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-4)
    for name in ("step", "epoch", "lr", "tokens"):
        assert two.column(name) == one.column(name)
    for which in ("best", "last"):
        assert distance(one.weights(which), two.weights(which)) < 1e-4
    assert two.reason == one.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(
    workspace: Workspace, seed: int, two: Path, tmp_path: Path, name: str
) -> None:
    common, alone, _ = RUNS[name]
    one = train(workspace, tmp_path, **settings(workspace, seed) | common | alone)
    both = Run(two / name)
    assert one.column("epoch").count(1) > 0  # past the step in which a process has no row
    assert both.of("start")[0]["world_size"] == 2
    compare(one, both)


@pytest.mark.slow
def test_evaluation_has_the_figures_of_one_process(
    workspace: Workspace, seed: int, two: Path, tmp_path: Path
) -> None:
    # An evaluation step has batch-size rows a process, whatever --accumulate says.
    common, alone, _ = RUNS["full"]
    one = train(workspace, tmp_path, **settings(workspace, seed) | common | alone)
    both = Run(two / "full")
    assert both.column("step", "eval") == one.column("step", "eval") == [0, 5, 10, 15, 16]
    for first, second in zip(one.of("eval"), both.of("eval"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        for name in ("token_accuracy", "exact_match", "records"):
            assert second[name] == first[name]


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(
    workspace: Workspace, seed: int, two: Path, tmp_path: Path
) -> None:
    common, alone, _ = RUNS["delta"]
    one = train(workspace, tmp_path, **settings(workspace, seed) | common | alone)
    assert Run(two / "of-one-process").column("step") == [1, 2, 3, 4]
    compare(one, Run(two / "resumed"))


def test_answers_are_shuffled_alike_on_any_number_of_processes(workspace: Workspace) -> None:
    # So that the comparisons above cover it: the data set has answers to shuffle.
    index = TokenIndex.of(BinaryDataset(workspace.train), Tokenizer.load(workspace.vocabulary))
    assert index._arrays["shuffled"].sum() == train_support.TRAINING // 3
