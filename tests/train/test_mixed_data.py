"""Training on several datasets with weights: losses of each, resuming, ranks, a dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import train_support
from train_support import Run, Workspace, distance, train

from cpm_bee.errors import InputError
from cpm_bee.train.log import Reporter


@pytest.fixture(scope="module")
def second(workspace: Workspace) -> Path:
    folder = workspace.folder / "more"
    return train_support.make_dataset(folder, "second", train_support.records(30, seed=9))


def mixture(workspace: Workspace, second: Path) -> str:
    return f"{workspace.train}=0.5,{second}=2"


def test_the_losses_of_each_dataset(workspace: Workspace, second: Path, tmp_path: Path) -> None:
    """Weighted by their targets they are the loss; alone, a dataset has its own."""
    flags: dict[str, Any] = {"use_delta": True, "max_steps": 3, "lr": 0.0001}
    run = train(workspace, tmp_path / "run", dataset=mixture(workspace, second), **flags)
    names = [str(workspace.train), str(second)]
    for event in run.of("train"):
        losses = event["dataset_losses"]
        assert list(losses) == names
        low, high = sorted(losses.values())
        assert low <= event["loss"] <= high and low != high
    whole = train(workspace, tmp_path / "whole", **flags)
    assert "dataset_losses" not in whole.of("train")[0]
    doubled = train(workspace, tmp_path / "one", dataset=f"{workspace.train}=2", **flags)
    for event in doubled.of("train"):
        assert event["dataset_losses"][names[0]] == pytest.approx(event["loss"], rel=1e-6)


def test_resuming_is_exact(workspace: Workspace, second: Path, tmp_path: Path) -> None:
    data = f"{workspace.train}=0.2,{second}=0.5"
    flags: dict[str, Any] = {
        "use_delta": True, "epoch": 4, "max_steps": 8, "save_interval": 2, "dataset": data,
    }  # fmt: skip
    whole = train(workspace, tmp_path / "whole", **flags)
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        original(self, values, **rest)
        if values["step"] == 5:
            raise KeyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "train_step", train_step)
        with pytest.raises(KeyError):
            train(workspace, tmp_path / "cut", **flags)
    resumed = train(workspace, tmp_path / "cut", resume=True, **flags)
    assert whole.column("epoch")[-1] > 0, "more than an epoch"
    assert resumed.column("step") == list(range(1, 9))
    for column in ("loss", "dataset_losses"):
        assert resumed.column(column) == whole.column(column)
    assert distance(resumed.weights(), whole.weights()) == 0
    other = f"{workspace.train}=1,{second}=2"
    with pytest.raises(InputError, match="records of --dataset"):
        train(workspace, tmp_path / "cut", resume=True, **{**flags, "dataset": other})


@pytest.mark.slow
def test_two_ranks_train_as_one(workspace: Workspace, second: Path, tmp_path: Path) -> None:
    flags = {
        "use_delta": True, "max_steps": 2, "dataset": mixture(workspace, second), "device": "cpu",
    }  # fmt: skip
    one = train(workspace, tmp_path / "one", batch_size=4, **flags)
    given = workspace.flags(tmp_path / "two", batch_size=2, **flags)
    started = train_support.start(train_support.command(*given, ranks=2), tmp_path)
    status, _, errors = train_support.finish(started)
    assert status == 0, errors
    two = Run(tmp_path / "two")
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    for ours, theirs in zip(
        two.column("dataset_losses"), one.column("dataset_losses"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_dry_run(
    workspace: Workspace, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = train_support.Options.parse(
        workspace.flags(
            tmp_path / "run", use_delta=True, dry_run=True, dataset=mixture(workspace, second)
        )
    )
    train_support.finetune(options)
    output = capsys.readouterr().out
    expected = train_support.TRAINING / 2 + 2 * 30
    assert f"training: about {expected:.0f} records" in output
    assert not (tmp_path / "run").exists()


def test_all_wrong_parts_are_named(workspace: Workspace, tmp_path: Path) -> None:
    given = f"{workspace.train}=2,{tmp_path}/no=1,{tmp_path}/none"
    with pytest.raises(InputError) as caught:
        train(workspace, tmp_path / "run", use_delta=True, dataset=given)
    assert f"--dataset {tmp_path}/no: no such folder" in str(caught.value)
    assert f"--dataset {tmp_path}/none: no such folder" in str(caught.value)
    with pytest.raises(InputError, match="expected FOLDER=WEIGHT"):
        train(workspace, tmp_path / "run", use_delta=True, dataset=f"{workspace.train}=much")
    with pytest.raises(InputError, match="the weights leave too few records for a step"):
        train(workspace, tmp_path / "run", use_delta=True, dataset=f"{workspace.train}=0.0001")
