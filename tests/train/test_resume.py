"""A run that was cut off goes on as if it had not been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from train_support import Run, Workspace, distance, train

from cpm_bee.data.packing import PLAN_VERSION
from cpm_bee.errors import InputError
from cpm_bee.train.log import Reporter


class CutOffError(Exception):
    pass


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return train_support.make_workspace(tmp_path_factory.mktemp("dropout"), dropout=0.2)


def cut_off(workspace: Workspace, save: Path, step: int, **values: Any) -> None:
    """A run that breaks after a step without any chance to save."""
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        original(self, values, **rest)
        if values["step"] == step:
            raise CutOffError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "train_step", train_step)
        with pytest.raises(CutOffError):
            train(workspace, save, **values)


def last_of_each_step(run: Run, event: str = "train") -> list[float]:
    return list({e["step"]: e["loss"] for e in run.of(event)}.values())


@pytest.mark.parametrize("cut", [3, 10])  # in the first and in the second epoch
@pytest.mark.parametrize("use_delta", [True, False])
def test_resuming_is_exact(
    with_dropout: Workspace, tmp_path: Path, use_delta: bool, cut: int
) -> None:
    flags = {
        "eval_dataset": with_dropout.eval, "eval_interval": 4, "save_interval": 2,
        "use_delta": use_delta, "delta_dropout": 0.3, "max_steps": 13, "epoch": 2,
        "lr_decay_style": "cosine", "warmup_iters": 3, "train_iters": 20,
    }  # fmt: skip
    whole = train(with_dropout, tmp_path / "whole", **flags)
    cut_off(with_dropout, tmp_path / "cut", cut, **flags)
    resumed = train(with_dropout, tmp_path / "cut", resume=True, **flags)
    assert resumed.column("step") == list(range(1, 14))  # steps done again stand there once
    assert last_of_each_step(resumed) == pytest.approx(whole.losses, rel=1e-6)
    assert resumed.column("lr") == whole.column("lr")
    assert resumed.column("epoch") == whole.column("epoch")
    evaluations = [last_of_each_step(run, "eval") for run in (resumed, whole)]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
    for which in ("best", "last"):
        assert distance(resumed.weights(which), whole.weights(which)) < 1e-6
    assert whole.of("start")[0]["options"]["resume"] == "never"
    assert [e["options"]["resume"] for e in resumed.of("start")] == ["never", "always"]


def test_every_step_has_dropout_masks_of_its_own(
    with_dropout: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        seeds.append(torch.initial_seed())
        original(self, values, **rest)

    monkeypatch.setattr(Reporter, "train_step", train_step)
    train(with_dropout, tmp_path, max_steps=5)
    assert len(set(seeds)) == 5


def test_the_loss_scale_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"use_delta": True, "dtype": "fp16", "loss_scale": 2.0**24, "loss_scale_steps": 3}
    whole = train(workspace, tmp_path / "whole", **flags)
    scales = whole.column("loss_scale")
    assert len(set(scales)) > 2
    train(workspace, tmp_path / "cut", max_steps=5, **flags)
    resumed = train(workspace, tmp_path / "cut", resume=True, **flags)
    assert resumed.column("loss_scale") == scales
    assert distance(resumed.weights(), whole.weights()) < 1e-6


def test_early_stop_counts_across_a_resume(workspace: Workspace, tmp_path: Path) -> None:
    flags = {
        "use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 1, "lr": 1e-30,
        "early_stop_patience": 4,
    }  # fmt: skip
    train(workspace, tmp_path, max_steps=2, **flags)
    run = train(workspace, tmp_path, resume=True, **flags)
    assert run.column("step") == [1, 2, 3, 4]
    assert run.reason.startswith("early stop: 4 evaluations")


def test_a_finished_run_can_be_prolonged(workspace: Workspace, tmp_path: Path) -> None:
    once = train(workspace, tmp_path / "once", use_delta=True, epoch=2)
    train(workspace, tmp_path / "twice", use_delta=True, epoch=1)
    twice = train(workspace, tmp_path / "twice", use_delta=True, epoch=2, resume=True)
    assert twice.losses == pytest.approx(once.losses, rel=1e-6)
    again = train(workspace, tmp_path / "twice", use_delta=True, epoch=2, resume=True)
    assert again.losses == twice.losses and again.reason == "all 2 epochs are done"
    assert distance(once.weights(), again.weights()) < 1e-6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 8}, "--seed"),
        ({"batch_size": 2}, "--batch-size"),
        ({"max_length": 60}, "--max-length"),
        ({"drop_last": True}, "--drop-last"),
        ({"delta_rank": 4}, "delta"),
        ({"use_delta": None}, "full fine-tuning"),
    ],
)
def test_resuming_something_else_is_refused(
    workspace: Workspace, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    run = train(workspace, tmp_path, use_delta=True, max_steps=2)
    log = (tmp_path / "cpm_bee_finetune-log.jsonl").read_bytes()
    with pytest.raises(InputError, match="--resume needs the same as before") as caught:
        train(workspace, tmp_path, **{"use_delta": True, "resume": True, **changed})
    assert named in str(caught.value)
    assert Run(tmp_path).files == run.files
    assert (tmp_path / "cpm_bee_finetune-log.jsonl").read_bytes() == log


@pytest.mark.parametrize("recorded", [None, PLAN_VERSION - 1])
def test_a_state_with_another_plan_of_steps_is_refused(
    workspace: Workspace, tmp_path: Path, recorded: int | None
) -> None:
    """Another version may have taken other records: going on would train some of them twice."""
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    path = tmp_path / "cpm_bee_finetune-state.pt"
    state = torch.load(path, weights_only=True)
    name = "version of the plan of steps"
    del state["settings"][name]
    if recorded is not None:
        state["settings"][name] = recorded
    torch.save(state, path)
    with pytest.raises(InputError, match="--resume needs the same as before") as caught:
        train(workspace, tmp_path, use_delta=True, resume=True)
    told = "not recorded by the earlier version" if recorded is None else str(recorded)
    assert f"{name}: {PLAN_VERSION}, it was {told}" in str(caught.value)


def test_resuming_on_another_base_or_data_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace, tmp_path / "run", use_delta=True, max_steps=2)
    train_support.make_model(tmp_path / "other", seed=5)
    flags = {"use_delta": True, "resume": True}
    with pytest.raises(InputError, match="another base model"):
        train(workspace, tmp_path / "run", load=tmp_path / "other", **flags)
    dataset = train_support.make_dataset(tmp_path, "other", train_support.records(60, seed=3))
    with pytest.raises(InputError, match="--dataset"):
        train(workspace, tmp_path / "run", dataset=dataset, **flags)


def test_resuming_with_another_evaluation_set_or_vocabulary_is_refused(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Best losses of two sets cannot be compared; a vocabulary of the same size reads other ids."""
    flags = {"use_delta": True, "max_steps": 1, "eval_dataset": workspace.eval}
    train(workspace, tmp_path / "run", **flags)
    flags |= {"resume": True, "max_steps": 2}
    other = train_support.make_dataset(tmp_path, "other", train_support.records(20, seed=3))
    for dataset in (other, None):
        with pytest.raises(InputError, match=r"records of --eval-dataset: .*, it was"):
            train(workspace, tmp_path / "run", **{**flags, "eval_dataset": dataset})
    tokens = workspace.vocabulary.read_text(encoding="utf-8").split("\n")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]), encoding="utf-8")
    with pytest.raises(InputError, match=r"tokens of --vocab: .*, it was"):
        train(workspace, tmp_path / "run", vocab=vocabulary, **flags)
    train(workspace, tmp_path / "run", **flags)


def test_a_state_without_these_fingerprints_is_used_with_a_warning(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    path = tmp_path / "cpm_bee_finetune-state.pt"
    state = torch.load(path, weights_only=True)
    del state["vocabulary_fingerprint"], state["evaluation_fingerprint"]
    torch.save(state, path)
    train(workspace, tmp_path, use_delta=True, max_steps=2, resume=True)
    told = [r.getMessage() for r in caplog.records if "did not record" in r.getMessage()]
    assert len(told) == 2 and "--vocab" in told[0] and "--eval-dataset" in told[1]
    for earlier in tmp_path.glob("*-state-*.pt"):  # which would be used instead
        earlier.unlink()
    state["evaluation_fingerprint"] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(InputError, match="evaluation_fingerprint: is not a text"):
        train(workspace, tmp_path, use_delta=True, resume=True)


def test_rows_may_be_spread_otherwise(workspace: Workspace, tmp_path: Path) -> None:
    whole = train(workspace, tmp_path / "whole", use_delta=True)
    train(workspace, tmp_path / "cut", use_delta=True, max_steps=3)
    resumed = train(
        workspace, tmp_path / "cut", use_delta=True, resume=True, batch_size=2, accumulate=2
    )
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)


def test_a_damaged_state_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    run = train(workspace, tmp_path, use_delta=True, max_steps=1)
    path = tmp_path / "cpm_bee_finetune-state.pt"
    (tmp_path / "cpm_bee_finetune-state-0.pt").unlink()  # which would be used instead
    shutil.copy(run.save / "cpm_bee_finetune-delta-last.pt", path)  # no state at all
    with pytest.raises(InputError, match="state"):
        train(workspace, tmp_path, use_delta=True, resume=True)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="damaged"):
        train(workspace, tmp_path, use_delta=True, resume=True)


def test_the_state_before_a_damaged_one_is_used(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(workspace, tmp_path / "whole", use_delta=True)
    save = tmp_path / "cut"
    train(workspace, save, use_delta=True, max_steps=2)
    state, earlier = save / "cpm_bee_finetune-state.pt", save / "cpm_bee_finetune-state-2.pt"
    shutil.copy(state, earlier)
    train(workspace, save, use_delta=True, resume=True, max_steps=3)
    content = bytearray(state.read_bytes())
    content[content.index(b"PK", 5000) - 200] ^= 1  # within a tensor
    state.write_bytes(content)
    caplog.clear()
    resumed = train(workspace, save, use_delta=True, resume=True)
    (told,) = [r.getMessage() for r in caplog.records if str(state) in r.getMessage()]
    assert "its checksum differs" in told and f"resuming from {earlier} instead" in told
    assert "\n" not in told
    assert resumed.column("step") == whole.column("step")
    assert distance(resumed.weights(), whole.weights()) == 0

    for path in (state, earlier):
        path.write_bytes(content)
    with pytest.raises(
        InputError, match="no earlier state is intact: start again without --resume"
    ):
        train(workspace, save, use_delta=True, resume=True)
