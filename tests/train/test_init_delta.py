"""A run that begins with the delta of an earlier one (`--init-delta`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from train_support import Run, Workspace, distance, train

from cpm_bee import delta
from cpm_bee.delta import DeltaFile
from cpm_bee.errors import InputError
from cpm_bee.train.agreement import refuse_different_deltas
from cpm_bee.train.options import Options

FILE = "cpm_bee_finetune-delta-last.pt"
OWN = {"delta_rank": 3, "delta_alpha": 5, "delta_targets": "w_0,project_v"}


@pytest.fixture(scope="module")
def first(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose delta has settings of its own."""
    save = tmp_path_factory.mktemp("first")
    with train_support.one_thread():
        return train(
            workspace, save, use_delta=True, max_steps=6, eval_dataset=workspace.eval, **OWN
        )


def go_on(workspace: Workspace, save: Path, first: Run, **values: Any) -> Run:
    flags = {"use_delta": True, "max_steps": 3, "init_delta": first.save / FILE, "seed": 8}
    return train(workspace, save, **{**flags, **values})


def refusal(workspace: Workspace, save: Path, first: Run, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        go_on(workspace, save, first, **values)
    assert not save.exists()
    return str(caught.value)


def test_it_begins_where_the_other_run_ended(
    workspace: Workspace, tmp_path: Path, first: Run
) -> None:
    run = go_on(workspace, tmp_path, first, eval_dataset=workspace.eval)
    ended, begun = first.of("eval")[-1], run.of("eval")[0]
    assert (begun["step"], ended["step"]) == (0, 6)
    names = ("loss", "token_accuracy", "exact_match", "records")
    assert [begun[n] for n in names] == [ended[n] for n in names]
    note = json.loads((tmp_path / "cpm_bee_finetune-delta-last.json").read_text())
    assert (note["rank"], note["alpha"], note["targets"]) == (3, 5, ["project_v", "w_0"])
    assert run.weights().keys() == first.weights().keys()
    assert distance(run.weights(), first.weights()) > 1e-3


def test_the_optimizer_is_new(workspace: Workspace, tmp_path: Path, first: Run) -> None:
    """AdamW's first step moves each value by the rate, whatever its gradient."""
    run = go_on(workspace, tmp_path, first, max_steps=1, lr=1e-3, weight_decay=0)
    before, after = first.weights(), run.weights()
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in before])
    assert moved.max() < 1e-3 * 1.001
    assert moved.median() > 1e-3 * 0.99
    assert run.column("lr") == [1e-3]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"delta_rank": 8}, "--delta-rank 8: "),  # the default of a new delta
        ({"delta_alpha": 16}, "--delta-alpha 16: "),
        ({"delta_targets": "project_q,project_v"}, "--delta-targets project_q,project_v: "),
    ],
)
def test_flags_that_contradict_it_are_refused(
    workspace: Workspace, tmp_path: Path, first: Run, flags: dict[str, Any], named: str
) -> None:
    message = refusal(workspace, tmp_path / "run", first, **flags)
    assert named in message and str(first.save / FILE) in message
    assert "leave out the flag" in message


def test_flags_that_say_the_same_are_accepted(
    workspace: Workspace, tmp_path: Path, first: Run
) -> None:
    same = {"delta_rank": 3, "delta_alpha": 5, "delta_targets": "project_v,w_0"}
    run = go_on(workspace, tmp_path / "a", first, **same)
    assert run.losses == go_on(workspace, tmp_path / "b", first).losses
    with_dropout = go_on(workspace, tmp_path / "c", first, delta_dropout=0.5)
    assert with_dropout.losses[0] != pytest.approx(run.losses[0], rel=1e-4)  # B is not zero


def test_another_base_or_vocabulary_is_refused(
    workspace: Workspace, tmp_path: Path, first: Run
) -> None:
    train_support.make_model(tmp_path / "other", seed=4)
    message = refusal(workspace, tmp_path / "run", first, load=tmp_path / "other")
    assert "was trained on another base model" in message
    tokens = train_support.TOKENS
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]), encoding="utf-8")
    message = refusal(workspace, tmp_path / "run", first, vocab=vocabulary)
    assert "was trained with another vocabulary" in message


def test_the_alpha_of_another_tool(workspace: Workspace, tmp_path: Path, first: Run) -> None:
    """Its delta records nothing."""
    bare = tmp_path / "bare.pt"
    torch.save(first.weights(), bare)
    given = go_on(workspace, tmp_path / "a", first, init_delta=bare, delta_alpha=5)
    assert given.losses == go_on(workspace, tmp_path / "b", first).losses
    note = json.loads((tmp_path / "a" / "cpm_bee_finetune-delta-best.json").read_text())
    assert note["alpha"] == 5 and len(note["base_fingerprint"]) == 64


@pytest.mark.parametrize("left", ["the same", "another", "none"])
def test_a_resumed_run_takes_its_state(
    workspace: Workspace, tmp_path: Path, first: Run, left: str
) -> None:
    """By the same command, whatever has become of the file."""
    file = tmp_path / "start.pt"
    shutil.copy(first.save / FILE, file)
    whole = go_on(workspace, tmp_path / "whole", first, max_steps=6)
    go_on(workspace, tmp_path / "cut", first, max_steps=3, init_delta=file)
    if left == "another":
        found = DeltaFile.read(file)
        zeros = {name: torch.zeros_like(t) for name, t in found.tensors.items()}
        prints = (found.base_fingerprint, found.vocabulary_fingerprint)
        delta.save(file, zeros, found.config, *prints)
    elif left == "none":
        file.unlink()
    run = go_on(workspace, tmp_path / "cut", first, max_steps=6, init_delta=file, resume=True)
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    assert distance(run.weights(), whole.weights()) < 1e-6
    with pytest.raises(InputError, match="--delta-rank 8: the saved state has 3"):
        go_on(workspace, tmp_path / "cut", first, init_delta=file, resume=True, delta_rank=8)


def test_from_the_files_that_the_run_replaces(
    workspace: Workspace, tmp_path: Path, first: Run
) -> None:
    """A run on its own earlier weights, in the same folder and of the same name."""
    save = Path(shutil.copytree(first.save, tmp_path / "run"))
    run = go_on(workspace, save, first, init_delta=save / FILE)
    assert run.losses == go_on(workspace, tmp_path / "b", first).losses
    previous = save / "cpm_bee_finetune-previous" / FILE
    assert previous.read_bytes() == (first.save / FILE).read_bytes()
    again = go_on(workspace, save, first, init_delta=save / FILE, resume=True, max_steps=5)
    assert again.column("step") == [1, 2, 3, 4, 5]


def test_on_a_quantized_base(workspace: Workspace, tmp_path: Path, first: Run) -> None:
    model = Path(shutil.copytree(workspace.model, tmp_path / "model"))
    flags = {"load": model, "quantize": "int8", "max_steps": 1, "lr": 1e-9}
    run = go_on(workspace, tmp_path / "run", first, **flags)
    assert distance(run.weights(), first.weights()) < 1e-6
    plain = go_on(workspace, tmp_path / "plain", first, max_steps=1, lr=1e-9)
    assert run.losses == pytest.approx(plain.losses, rel=0.02) and run.losses != plain.losses


def test_processes_with_different_files_stop(first: Run) -> None:
    class Other:
        """An engine of two processes, of which the other has another number."""

        def reduce_max(self, values: list[int]) -> list[int]:
            return [max(own, other) for own, other in zip(values, (5, -5), strict=True)]

    file = str(first.save / FILE)
    options = Options(dataset="", use_delta=True, init_delta=file)
    with pytest.raises(InputError, match="the processes have different files"):
        refuse_different_deltas(Other(), options)  # type: ignore[arg-type]
    resumed = Options(dataset="", use_delta=True, init_delta=file, resume=True)
    refuse_different_deltas(Other(), resumed)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes(workspace: Workspace, tmp_path: Path, first: Run) -> None:
    """With DDP and FSDP, as one process does it."""
    flags = {"use_delta": True, "max_steps": 2, "init_delta": first.save / FILE}
    one = train(workspace, tmp_path / "one", batch_size=4, **flags)
    samples = train_support.Samples.of(one, workspace, batch_size=4, **flags)
    plan = [
        (
            train_support.free_port(),
            workspace.flags(tmp_path / way, batch_size=2, parallel=way, **flags),
        )
        for way in ("ddp", "fsdp")
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    command = train_support.command(str(path), ranks=2, script=Path(train_support.__file__))
    environment = {"PYTHONPATH": f"{train_support.support.ROOT / 'src'}"}
    process = train_support.start(command, tmp_path, **environment)
    status, _, errors = train_support.finish(process)
    assert status == 0, errors
    for way in ("ddp", "fsdp"):
        samples.check(Run(tmp_path / way), evaluations=False)
