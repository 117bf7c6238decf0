"""Training with in-context samples: resuming, ranks, a dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from train_support import Run, Workspace, distance, train

from cpm_bee.errors import InputError
from cpm_bee.train.log import Reporter

WEIGHTS = "0.4,0.3,0.3"
FLAGS: dict[str, Any] = {
    "use_delta": True, "max_length": 100, "incontext_weights": WEIGHTS, "device": "cpu",
}  # fmt: skip


def test_resuming_is_exact(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {**FLAGS, "epoch": 2, "max_steps": 10, "save_interval": 2}
    whole = train(workspace, tmp_path / "whole", **flags)
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        original(self, values, **rest)
        if values["step"] == 5:
            raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "train_step", train_step)
        with pytest.raises(KeyError):
            train(workspace, tmp_path / "cut", **flags)
    for other in ("0.5,0.5", None):
        with pytest.raises(InputError, match=rf"--incontext-weights: .*, it was {WEIGHTS}"):
            train(workspace, tmp_path / "cut", resume=True, **{**flags, "incontext_weights": other})
    resumed = train(workspace, tmp_path / "cut", resume=True, **flags)
    assert whole.column("epoch")[-1] == 1, "the second epoch, which draws other samples"
    assert resumed.column("step") == list(range(1, 11))
    for column in ("loss", "tokens"):
        assert resumed.column(column) == whole.column(column)
    assert distance(resumed.weights(), whole.weights()) == 0


def test_a_state_of_an_earlier_version_had_no_samples(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    for path in tmp_path.glob("*-state*.pt"):
        state = torch.load(path, weights_only=True)
        del state["settings"]["--incontext-weights"]
        torch.save(state, path)
    with pytest.raises(InputError, match=f"--incontext-weights: {WEIGHTS}, it was none"):
        train(workspace, tmp_path, resume=True, **{**FLAGS, "max_length": 64})
    run = train(workspace, tmp_path, use_delta=True, max_steps=2, resume=True)
    assert run.column("step") == [1, 2]


@pytest.mark.slow
def test_two_ranks_train_as_one(workspace: Workspace, tmp_path: Path) -> None:
    one = train(workspace, tmp_path / "one", batch_size=4, max_steps=3, **FLAGS)
    given = workspace.flags(tmp_path / "two", batch_size=2, max_steps=3, **FLAGS)
    started = train_support.start(train_support.command(*given, ranks=2), tmp_path)
    status, _, errors = train_support.finish(started)
    assert status == 0, errors
    two = Run(tmp_path / "two")
    assert two.column("tokens") == one.column("tokens")
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


def test_a_dry_run_tells_the_same(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The token index is there, so that its figures are exact."""
    train(workspace, tmp_path / "run", max_steps=1, **FLAGS)
    lines = [s for s in capsys.readouterr().out.splitlines() if "in-context samples" in s]
    options = train_support.Options.parse(workspace.flags(tmp_path / "none", dry_run=True, **FLAGS))
    train_support.finetune(options)
    assert len(lines) == 1 and lines[0] in capsys.readouterr().out
