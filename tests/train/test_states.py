"""The saved states of a run: which are kept, when they are saved, and from which a run resumes."""

from __future__ import annotations

import io
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kills import Killed, is_killed
from train_support import Run, Workspace, distance, train

from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import InputError
from cpm_bee.train import trainer
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.log import Reporter
from cpm_bee.train.provenance import RunProvenance
from cpm_bee.train.training_state import TrainingState

NAME = "cpm_bee_finetune"
ENGINE = {"tensors": {}, "optimizer": {}, "loss_scale": 1.0, "good_steps": 0}


def files_of(folder: Path, limit: int) -> RunFiles:
    origin = RunProvenance(tiny.make_config(), "vocab", "base", "", "", None)
    return RunFiles(str(folder), "run", origin, save_total_limit=limit)


def save(files: RunFiles, step: int) -> None:
    files.save_state(ENGINE, asdict(TrainingState(step=step, saved_step=step)), {})


def steps_of(folder: Path, name: str = "run") -> list[int]:
    """The steps of all states in a folder; fails if one is not whole or has another step's name."""
    found = []
    for path in folder.glob(f"{name}-state*.pt"):
        found.append(torch.load(path, weights_only=True)["progress"]["step"])
        assert path.name in (f"{name}-state.pt", f"{name}-state-{found[-1]}.pt")
    return sorted(found)


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_kill_between_any_two_operations_leaves_whole_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    for count in range(20):
        folder = tmp_path / str(count)
        files = files_of(folder, limit)
        for step in (0, 5, 10, 15):
            save(files, step)
        before = steps_of(folder)
        assert before == [0, 5, 10, 15][-limit:]
        killed = is_killed(monkeypatch, count, lambda files=files: save(files, 20))
        left = steps_of(folder)
        assert set(before) <= {*left, min(before)} and (not has_links or files.state.is_file())
        resumed = files_of(folder, limit)
        step = resumed.load_state()[1]["step"]
        assert step == max(left) in (15, 20)
        for path in resumed.states():
            assert files_of(folder, limit).load_state(path=path)[1]["step"] in left
        for later in range(step + 5, 40, 5):
            save(resumed, later)
        assert steps_of(folder) == [25, 30, 35][-limit:]
        if not killed:
            assert count >= min(limit, 3) and left == [5, 10, 15, 20][-limit:]
            return
    raise AssertionError("20 operations did not suffice")


def no_links(*_: Any) -> None:
    raise PermissionError


def test_a_run_from_an_earlier_state_drops_the_later_ones(tmp_path: Path) -> None:
    """As when the newest one is damaged: what follows it must not be taken for newer."""
    files = files_of(tmp_path, 4)
    for step in (0, 5, 10, 15):
        save(files, step)
    files.state.unlink()
    resumed = files_of(tmp_path, 4)
    assert [p.name for p in resumed.states()] == [f"run-state-{n}.pt" for n in (10, 5, 0)]
    assert resumed.load_state()[1]["step"] == 10 and not resumed.begins_new_run
    save(resumed, 12)
    assert steps_of(tmp_path) == [0, 5, 10, 12]
    (tmp_path / "run-state-20.pt").write_bytes((tmp_path / "run-state-5.pt").read_bytes())
    save(resumed, 13)
    assert steps_of(tmp_path) == [5, 10, 12, 13]


def test_the_clock_decides_with_save_minutes(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes half a minute here."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        trainer,
        "time",
        SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter),
    )
    original = Reporter.train_step

    def train_step(self: Reporter, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        clock.now += 30

    monkeypatch.setattr(Reporter, "train_step", train_step)
    flags = {"use_delta": True, "save_total_limit": 99, "epoch": 9, "save_minutes": 1}
    run = train(workspace, tmp_path / "a", max_steps=7, **flags)
    assert steps_of(run.save, NAME) == [0, 3, 6, 7]
    run = train(workspace, tmp_path / "b", max_steps=9, save_interval=4, **flags)
    assert steps_of(run.save, NAME) == [0, 3, 4, 7, 8, 9]  # counted from the last one, of any kind
    run = train(workspace, tmp_path / "a", max_steps=11, resume=True, **flags)
    assert steps_of(run.save, NAME) == [0, 3, 6, 7, 10, 11]


def test_the_clock_of_any_process_decides(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the reduction that every step has, so that all save after the same step."""
    original, calls = TorchEngine.reduce, []

    def reduce(self: TorchEngine, values: list[float]) -> list[float]:
        result = original(self, values)
        if len(values) == 3:
            calls.append(values)
            result[2] += len(calls) == 2  # that of another process, in the second step
        return result

    monkeypatch.setattr(TorchEngine, "reduce", reduce)
    run = train(workspace, tmp_path, use_delta=True, save_total_limit=9, max_steps=4)
    assert steps_of(run.save, NAME) == [0, 2, 4]
    assert [late for _, _, late in calls] == [0, 0, 0, 0]


def test_auto_resumes_where_it_can_and_says_what_it_does(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"use_delta": True, "resume": "auto"}
    run = train(workspace, tmp_path, max_steps=2, **flags)
    told = capsys.readouterr().out
    assert f"--resume auto: no saved state {tmp_path / NAME}-state.pt, the run begins anew" in told
    assert run.column("step") == [1, 2]
    run = train(workspace, tmp_path, max_steps=4, **flags)
    assert "resumed after step 2" in capsys.readouterr().out
    assert run.column("step") == [1, 2, 3, 4] and len(run.of("start")) == 2
    run = train(workspace, tmp_path, max_steps=3, seed=8, delta_rank=4, **flags)
    told = capsys.readouterr().out
    assert "warning: --resume auto: the run begins anew, because" in told
    assert "--seed: 8, it was 7" in told and "  delta: " in told
    assert run.column("step") == [1, 2, 3] and len(run.of("start")) == 1
    assert Run(tmp_path / f"{NAME}-previous").column("step") == [1, 2, 3, 4]
    run = train(workspace, tmp_path, max_steps=4, seed=8, delta_rank=4, **flags)
    assert "resumed after step 3" in capsys.readouterr().out
    for path in tmp_path.glob(f"{NAME}-state*.pt"):
        path.write_bytes(b"damaged")
    run = train(workspace, tmp_path, max_steps=1, seed=8, delta_rank=4, **flags)
    assert "begins anew, because" in capsys.readouterr().out and run.column("step") == [1]


def test_auto_does_not_take_an_unreadable_state_for_a_missing_one(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    before = sorted(tmp_path.iterdir())

    def load_state(self: RunFiles, *_: Any) -> None:
        raise OSError(5, "Input/output error", str(self.state))

    monkeypatch.setattr(RunFiles, "load_state", load_state)
    with pytest.raises(InputError, match="input/output error"):
        train(workspace, tmp_path, use_delta=True, max_steps=2, resume="auto")
    assert sorted(tmp_path.iterdir()) == before


def test_an_earlier_state_begins_a_new_run(workspace: Workspace, tmp_path: Path) -> None:
    """The run that it is taken from is an earlier run from then on."""
    flags = {"use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 2, "keep_runs": 2}
    whole = train(workspace, tmp_path / "run", max_steps=6, save_total_limit=9, **flags)
    losses = dict(zip(whole.column("step", "eval"), whole.column("loss", "eval"), strict=True))
    assert min(losses, key=lambda step: losses[step]) == 6  # later than the state
    state = tmp_path / "run" / f"{NAME}-state-2.pt"
    again = train(workspace, tmp_path / "run", max_steps=6, resume=state, **flags)
    assert again.losses == whole.losses and again.column("step") == [1, 2, 3, 4, 5, 6]
    assert again.column("loss", "eval") == whole.column("loss", "eval")
    assert steps_of(again.save, NAME) == [4, 6]
    previous = again.save / f"{NAME}-previous"
    assert steps_of(previous, NAME) == [0, 2, 4, 6]
    for which in ("best", "last"):
        assert distance(again.weights(which), whole.weights(which)) == 0
        assert distance(Run(previous).weights(which), whole.weights(which)) == 0
    # From a folder of an earlier run, with nothing left to train.
    short = train(
        workspace, tmp_path / "run", max_steps=4, resume=previous / f"{NAME}-state-4.pt", **flags
    )
    assert short.column("step") == [1, 2, 3, 4] and short.column("step", "eval") == [0, 2, 4]
    assert steps_of(short.save, NAME) == [4]
    assert steps_of(short.save / f"{NAME}-previous-2", NAME) == [0, 2, 4, 6]
    assert math.isclose(short.column("loss", "eval")[-1], losses[4])
    assert distance(short.weights("best"), short.weights("last")) == 0


def test_an_earlier_state_keeps_the_best_weights_before_it(
    workspace: Workspace, tmp_path: Path
) -> None:
    flags = {"use_delta": True, "eval_dataset": workspace.eval, "eval_interval": 2, "lr": 1e-30}
    whole = train(workspace, tmp_path / "run", max_steps=6, save_total_limit=9, **flags)
    assert len(set(whole.column("loss", "eval"))) == 1  # the first one is the best
    state = tmp_path / "run" / f"{NAME}-state-4.pt"
    other = train(
        workspace, tmp_path / "other", max_steps=5, resume=state, save_name="mine", **flags
    )
    assert other.column("step") == [1, 2, 3, 4, 5]
    assert other.column("step", "eval") == [0, 2, 4, 5]
    progress = torch.load(other.save / "mine-state.pt", weights_only=True)["progress"]
    assert progress["best_loss"] == whole.column("loss", "eval")[0]
    assert progress["evaluations_without_gain"] == 3
    assert distance(other.weights("best"), whole.weights("best")) == 0
    assert (other.save / "mine-delta-best.json").is_file()


def test_the_newest_state_by_its_path_continues_its_run(
    workspace: Workspace, tmp_path: Path
) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=2)
    state = tmp_path / f"{NAME}-state.pt"
    (tmp_path / "link.pt").symlink_to(state)
    for steps, path in ((3, state), (4, tmp_path / "link.pt")):
        run = train(workspace, tmp_path, use_delta=True, max_steps=steps, resume=path)
        assert (
            run.column("step") == list(range(1, steps + 1)) and f"{NAME}-previous" not in run.files
        )
        assert steps_of(tmp_path, NAME) == [steps - 1, steps]


def test_a_state_that_is_given_is_checked_like_the_newest_one(
    workspace: Workspace, tmp_path: Path
) -> None:
    train(workspace, tmp_path / "run", use_delta=True, max_steps=2)
    state = tmp_path / "run" / f"{NAME}-state-0.pt"
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(
        InputError, match=rf"{state}: --resume needs the same as before(.|\n)*--seed"
    ):
        train(workspace, tmp_path / "run", use_delta=True, seed=9, resume=state)
    with pytest.raises(InputError, match=r"--resume \S*nowhere.pt: no such file"):
        train(workspace, tmp_path / "run", use_delta=True, resume=tmp_path / "nowhere.pt")
    assert sorted((tmp_path / "run").iterdir()) == before


def test_a_state_with_a_name_of_its_own_begins_a_log_of_its_own(
    workspace: Workspace, tmp_path: Path
) -> None:
    flags = {"use_delta": True, "eval_dataset": workspace.eval}
    whole = train(workspace, tmp_path / "run", max_steps=2, **flags)
    kept = (tmp_path / "run" / f"{NAME}-state.pt").rename(tmp_path / "kept.pt")
    run = train(workspace, tmp_path / "new", max_steps=3, resume=kept, **flags)
    assert run.column("step") == [3] and run.column("step", "eval") == [2, 3]
    assert run.column("loss", "eval")[0] == whole.column("loss", "eval")[-1]


def test_a_folder_that_has_changed_since_is_noticed(tmp_path: Path) -> None:
    """A start that completes the renames of a killed one may move the state that was given."""
    files = files_of(tmp_path / "run", 2)
    for step in (0, 5):
        save(files, step)
    path = tmp_path / "run" / "run-state-0.pt"
    resumed = files_of(tmp_path / "run", 2)
    progress = resumed.load_state(path=path)[1]
    path.write_bytes(path.rename(tmp_path / "moved.pt").read_bytes())
    with pytest.raises(InputError, match="has moved this file"):
        resumed.begin(progress)


def test_processes_that_find_different_states_end(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on machines without a common file system."""
    train(workspace, tmp_path, use_delta=True, max_steps=2)
    original = TorchEngine.reduce_max

    def reduce_max(self: TorchEngine, values: list[int]) -> list[int]:
        result = original(self, values)
        return [max(2, values[0]), 1] if values in ([2, -2], [-1, 1]) else result

    monkeypatch.setattr(TorchEngine, "reduce_max", reduce_max)
    told = "one process finds no state, another one the state of step 2; --save must be on"
    for values in ({"resume": True}, {"resume": "auto", "seed": 8}):
        with pytest.raises(InputError, match=told):
            train(workspace, tmp_path, use_delta=True, max_steps=4, **values)


@pytest.mark.parametrize("count", range(40))
def test_a_kill_while_an_earlier_state_begins_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    files = files_of(tmp_path, 9)
    for step in (0, 5, 10, 15):
        save(files, step)
    files.log.write_text('{"event": "eval", "step": 5, "loss": 2.0}\n')
    files.best.write_text("weights")

    def begin() -> None:
        resumed = files_of(tmp_path, 9)
        progress = resumed.load_state(path=tmp_path / "run-state-5.pt")[1]
        assert resumed.begin({**progress, "best_loss": 2.0})
        save(resumed, 5)
        save(resumed, 7)

    killed = is_killed(monkeypatch, count, begin)
    resumed = files_of(tmp_path, 9)
    progress = resumed.load_state()[1]
    resumed.begin(progress)
    steps = sorted(set(steps_of(tmp_path)))  # between two operations the newest one has two names
    assert progress["step"] == max(steps)
    if steps != [0, 5, 10, 15]:
        assert steps in ([5], [5, 7]) and steps_of(tmp_path / "run-previous") == [0, 5, 10, 15]
        assert (tmp_path / "run-previous" / files.best.name).read_text() == "weights"
    assert files.best.read_text() == "weights"
    assert killed or (count > 10 and steps == [5, 7])


def test_a_kill_within_a_write_leaves_whole_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(tmp_path, 2)
    for step in (0, 5):
        save(files, step)

    def half(value: Any, file: Any) -> None:
        buffer = io.BytesIO()
        original(value, buffer)
        write = file.write_bytes if isinstance(file, Path) else file.write
        write(buffer.getvalue()[:100])
        raise Killed

    original = torch.save
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        save(files, 10)
    monkeypatch.undo()
    assert files_of(tmp_path, 2).load_state()[1]["step"] == 5
    assert set(steps_of(tmp_path)) == {0, 5}
