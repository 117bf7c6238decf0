"""What a run writes, and why it ends."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from train_support import (
    DIGEST_FIELDS,
    END_FIELDS,
    EVAL_FIELDS,
    SAMPLES_FIELDS,
    TRAIN_FIELDS,
    Run,
    Workspace,
    after_steps,
    train,
)

from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.errors import InputError, RunError
from cpm_bee.pretrained import load_pretrained

NAME = "cpm_bee_finetune"
CPU = torch.device("cpu")


def kinds(run: Run) -> list[str]:
    return [event["event"] for event in run.events]


def test_the_log_has_the_promised_events_and_fields(workspace: Workspace, tmp_path: Path) -> None:
    run = train(workspace, tmp_path, use_delta=True, eval_dataset=workspace.eval, eval_interval=3)
    first = ["digest", "train", "digest", "train", "digest", "train"]
    second = ["train", "train", "digest", "train"]
    evaluation = ["eval", "samples"]
    assert kinds(run) == [
        "start",
        *evaluation,
        *first,
        *evaluation,
        *second,
        *evaluation,
        *["train", "train", "digest"],
        *evaluation,
        "end",
    ]
    assert all(list(e) == SAMPLES_FIELDS for e in run.of("samples"))
    assert all(list(e) == TRAIN_FIELDS for e in run.of("train"))
    assert all(list(e) == EVAL_FIELDS for e in run.of("eval"))
    assert all(list(e) == DIGEST_FIELDS for e in run.of("digest"))
    assert run.column("step", "digest") == [0, 1, 2, 5, 8]
    assert all(list(e) == END_FIELDS for e in run.of("end"))
    assert run.column("step") == list(range(1, 9))
    assert run.column("step", "eval") == [0, 3, 6, 8]
    assert run.events[-1] == {
        "event": "end", "reason": "all 1 epochs are done", "step": 8, "finished": True,
    }  # fmt: skip
    assert run.column("records", "eval") == [train_support.EVALUATION] * 4
    assert all(0 < tokens <= 4 * 64 for tokens in run.column("tokens"))
    assert all(speed > 0 for speed in run.column("tokens_per_second"))


def test_training_learns(workspace: Workspace, tmp_path: Path) -> None:
    run = train(workspace, tmp_path, eval_dataset=workspace.eval, epoch=8)
    first, last = run.of("eval")
    assert last["loss"] < 0.5 * first["loss"]
    assert last["token_accuracy"] > first["token_accuracy"] + 0.3
    assert last["exact_match"] > first["exact_match"]
    assert sum(run.losses[-8:]) < 0.6 * sum(run.losses[:8])


@pytest.mark.parametrize("with_evaluation", [True, False])
@pytest.mark.parametrize("use_delta", [True, False])
def test_a_run_of_one_step_leaves_best_and_last(
    workspace: Workspace, tmp_path: Path, use_delta: bool, with_evaluation: bool
) -> None:
    evaluation = workspace.eval if with_evaluation else None
    run = train(workspace, tmp_path, use_delta=use_delta, max_steps=1, eval_dataset=evaluation)
    infix = "-delta" if use_delta else ""
    weights = [f"{NAME}{infix}-{w}.{s}" for w in ("best", "last") for s in ("json", "pt")]
    states = [f"{NAME}-state-0.pt", f"{NAME}-state.pt"]
    others = ("config.yaml", "log.jsonl", "receipt.json", "report.html")
    assert run.files == sorted([*weights, *states, *(f"{NAME}-{other}" for other in others)])
    assert run.weights("best").keys() == run.weights("last").keys()


def test_best_is_the_state_with_the_lowest_evaluation_loss(
    workspace: Workspace, tmp_path: Path
) -> None:
    # A rate that makes things worse from some step on.
    run = train(
        workspace, tmp_path, use_delta=True, eval_dataset=workspace.eval, eval_interval=1, lr=0.3,
        epoch=6, early_stop_patience=4,
    )  # fmt: skip
    losses = run.column("loss", "eval")
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert run.reason.startswith("early stop: 4 evaluations") and len(losses) - 1 - best >= 4
    shorter = train(
        workspace, tmp_path / "to-the-best", use_delta=True, lr=0.3, epoch=6, max_steps=best
    )
    assert train_support.distance(run.weights("best"), shorter.weights("last")) < 1e-6
    assert train_support.distance(run.weights("best"), run.weights("last")) > 0.01


def test_patience_counts_evaluations_in_a_row(workspace: Workspace, tmp_path: Path) -> None:
    run = train(
        workspace, tmp_path, use_delta=True, eval_dataset=workspace.eval, eval_interval=1, lr=0.1,
        epoch=20, early_stop_patience=2, seed=3,
    )  # fmt: skip
    losses = run.column("loss", "eval")
    gains = [loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)]
    assert not any(gains[-2:])
    assert all(a or b for a, b in itertools.pairwise(gains[:-1]))
    assert not all(gains[:-2])  # or nothing shows that a gain begins the count again


def test_a_nan_loss_ends_the_run_and_the_last_good_state_is_kept(
    workspace: Workspace, tmp_path: Path
) -> None:
    flags = {"use_delta": True, "save_interval": 2}
    train(workspace, tmp_path, max_steps=2, **flags)
    good = Run(tmp_path).weights()
    with pytest.raises(RunError, match=r"the loss of step 4 is nan.*after 2 steps is kept"):
        train(workspace, tmp_path, resume=True, lr=1e30, save_interval=2, use_delta=True)
    run = Run(tmp_path)
    assert run.events[-1]["step"] == 3 and "nan" in run.reason
    assert train_support.distance(run.weights(), good) == 0
    healed = train(workspace, tmp_path, resume=True, max_steps=5, **flags)
    assert all(map(math.isfinite, healed.losses))
    assert healed.column("step") == [1, 2, 3, 4, 5]


def test_a_nan_loss_at_once_leaves_the_state_of_the_beginning(
    workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="lower --lr"):
        train(workspace, tmp_path, use_delta=True, lr=1e30)
    run = Run(tmp_path)
    assert run.column("step") == [1]
    for which in ("best", "last"):
        for name, tensor in run.weights(which).items():
            assert torch.isfinite(tensor).all() and (name.endswith("lora_A") or not tensor.any())


def test_a_broken_base_model_ends_the_run_before_training(
    workspace: Workspace, tmp_path: Path
) -> None:
    train_support.make_model(tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    weights = dict(load_tensors(path, "a checkpoint"))
    name = "encoder.output_layernorm.weight"
    save_tensors(path, {**weights, name: torch.full_like(weights[name], math.nan)})
    blamed = rf"model: there are values that are not finite in {name}: the checkpoint is damaged"
    for number, use_delta in enumerate((True, None)):
        values = {"load": tmp_path / "model", "use_delta": use_delta}
        with pytest.raises(RunError, match=blamed) as error:
            train(workspace, tmp_path / f"{number}", **values, eval_dataset=workspace.eval)
        assert "--lr" not in str(error.value)
        assert kinds(Run(tmp_path / f"{number}")) == ["start", "end"]
        with pytest.raises(RunError, match=blamed):  # without an evaluation, in the first step
            train(workspace, tmp_path / f"{number} without", **values)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = train(workspace, tmp_path / "whole", use_delta=True, max_steps=5)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after_steps(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(
            RunError, match="interrupted after step 3; the same command with --resume"
        ):
            train(workspace, tmp_path / "cut", use_delta=True, max_steps=5)
    assert signal.getsignal(number) == before
    assert Run(tmp_path / "cut").reason == (
        "interrupted after step 3; the same command with --resume goes on from there"
    )
    resumed = train(workspace, tmp_path / "cut", use_delta=True, max_steps=5, resume=True)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
    assert train_support.distance(resumed.weights(), whole.weights()) < 1e-6


def test_a_second_ctrl_c_ends_a_run_at_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_steps(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(workspace, tmp_path, use_delta=True)
    assert Run(tmp_path).column("step") == [1]
    assert not [name for name in Run(tmp_path).files if "partial" in name]


def test_the_files_of_an_earlier_run_are_moved(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"use_delta": True, "max_steps": 1}
    other = train(workspace, tmp_path, save_name="run-b", seed=1, **flags)
    first = train(workspace, tmp_path, save_name="run", seed=2, **flags)
    assert "-previous" not in capsys.readouterr().out
    full = train(workspace, tmp_path, save_name="run", seed=3, max_steps=1)
    assert f"{tmp_path / 'run-previous'}" in capsys.readouterr().out
    previous = Run(tmp_path / "run-previous", "run")
    assert previous.losses == first.losses != full.losses
    assert len(previous.files) == 10 and not any("run-delta" in name for name in full.files)
    assert Run(tmp_path, "run-b").losses == other.losses
    train(workspace, tmp_path, save_name="run", seed=4, **flags)
    previous = Run(tmp_path / "run-previous", "run")
    assert previous.losses == full.losses  # one earlier run is kept
    assert not any("delta" in name for name in previous.files)


def test_a_name_with_pattern_characters_is_set_aside_too(
    workspace: Workspace, tmp_path: Path
) -> None:
    for seed in (1, 2):
        train(workspace, tmp_path, save_name="[a]*", use_delta=True, max_steps=1, seed=seed)
    assert (tmp_path / "[a]*-previous" / "[a]*-state.pt").is_file()


def test_a_run_that_cannot_start_moves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    before = train(workspace, tmp_path, use_delta=True, max_steps=1).files
    for values in ({"max_length": 3}, {"load": tmp_path / "none"}, {"delta_targets": "x"}):
        with pytest.raises(InputError):
            train(workspace, tmp_path, use_delta=True, **values)
    assert Run(tmp_path).files == before


def test_records_that_are_too_long_are_counted_with_their_share(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = train_support.records(19, seed=5)
    dataset = train_support.make_dataset(
        tmp_path, "long", [*values, {"input": "a" * 100, "<ans>": "b"}]
    )
    train(workspace, tmp_path / "run", use_delta=True, dataset=dataset, eval_dataset=dataset)
    printed = capsys.readouterr().out
    for name in ("training", "evaluation"):
        assert f"{name}: 19 records\nwarning: 1 {name} records (5.00%) are longer" in printed
    assert Run(tmp_path / "run").column("records", "eval") == [19, 19]


@pytest.mark.parametrize("which", ["dataset", "eval_dataset"])
def test_a_data_set_of_too_long_records_is_refused(
    workspace: Workspace, tmp_path: Path, which: str
) -> None:
    dataset = train_support.make_dataset(tmp_path, "long", [{"input": "a" * 100, "<ans>": "b"}])
    with pytest.raises(InputError, match=r"none of its 1 records fits.*the longest has 1"):
        train(workspace, tmp_path / "run", use_delta=True, **{which: dataset})
    assert not (tmp_path / "run").exists()


def test_records_that_the_model_cannot_read_are_all_listed(
    workspace: Workspace, tmp_path: Path
) -> None:
    bad: list[Any] = [{"input": f"<no{i}>", "<ans>": "b"} for i in "ab"]
    dataset = train_support.make_dataset(tmp_path, "bad", [*train_support.records(3, 0), *bad])
    with pytest.raises(InputError) as caught:
        train(workspace, tmp_path / "run", use_delta=True, dataset=dataset)
    assert "<noa>" in str(caught.value) and "<nob>" in str(caught.value)
    assert sorted(p.name for p in dataset.iterdir()) == ["checksums.json", "data", "meta.bin"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("half", [True, False])
def test_full_fine_tuning_saves_a_native_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    model = tmp_path / "model"
    config = replace(train_support.CONFIG, half=half, position_bias_max_distance=99)
    train_support.make_model(model, config)
    monkeypatch.chdir(tmp_path)  # so that the vocabulary is named relative to a folder
    run = train(workspace, tmp_path / "run", load="model", max_steps=3, eval_dataset=workspace.eval)
    monkeypatch.chdir("/")
    weights = run.weights("last")
    base = load_tensors(model / "pytorch_model.bin", "a checkpoint")
    assert weights.keys() == base.keys()
    assert {t.dtype for t in weights.values()} == {torch.float16 if half else torch.float32}
    assert train_support.distance(weights, base) > 0.01
    path = run.save / f"{NAME}-last.pt"
    loaded = load_pretrained(str(path), "auto", None, torch.float32, CPU)
    assert loaded.model.config == config
    assert loaded.tokenizer.tokens == train_support.TOKENS
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[name].float())
    again = train(
        workspace, tmp_path / "again", load=path, use_delta=True, eval_dataset=workspace.eval,
        max_steps=1,
    )  # fmt: skip
    tolerance = 2e-3 if half else 1e-6
    assert again.column("loss", "eval")[0] == pytest.approx(
        run.column("loss", "eval")[-1], rel=tolerance
    )
    note = json.loads((again.save / f"{NAME}-delta-best.json").read_text())
    assert note["base_fingerprint"] == loaded.fingerprint


def test_what_is_missing_is_listed_at_once(workspace: Workspace, tmp_path: Path) -> None:
    names = ("dataset", "eval_dataset", "load", "vocab", "model_config")
    with pytest.raises(InputError) as caught:
        train(
            workspace, tmp_path / "run", use_delta=True, engine="bmtrain",
            **{name: tmp_path / f"no-{name}" for name in names},
        )  # fmt: skip
    for name in names:
        assert f"--{name.replace('_', '-')} {tmp_path / f'no-{name}'}: no such" in str(caught.value)
    assert "--engine bmtrain" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_moves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """And one that fails later, unfinished, is not kept in place of one that is finished."""
    folder = tmp_path / "results"
    flags = {"use_delta": True, "max_steps": 1, "eval_dataset": workspace.eval}
    good = train(workspace, folder, **flags)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    train_support.make_model(tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    weights = dict(load_tensors(path, "a checkpoint"))
    name = "encoder.output_layernorm.weight"
    save_tensors(path, {**weights, name: torch.full_like(weights[name], math.nan)})
    for values in (flags, {**flags, "use_delta": None}):
        with pytest.raises(RunError, match="the checkpoint is damaged"):
            train(workspace, folder, **{**values, "load": tmp_path / "model"})
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    for _ in range(3):  # without an evaluation it fails in its first step, with a state saved
        with pytest.raises(RunError):
            train(workspace, folder, use_delta=True, load=tmp_path / "model")
    places = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert places == ["cpm_bee_finetune-previous", "cpm_bee_finetune-previous-2"]
    kept = Run(folder / "cpm_bee_finetune-previous-2")
    assert kept.losses == good.losses
    assert {p.name: p.read_bytes() for p in kept.save.iterdir()} == before


def test_under_nohup_a_closed_terminal_ends_no_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_steps(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = train(workspace, tmp_path, use_delta=True, max_steps=4)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    assert run.column("step") == [1, 2, 3, 4] and run.events[-1]["finished"]
