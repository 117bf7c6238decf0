"""The training script with `--engine bmtrain`, on CPUs, does what it does with the torch engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bmtrain_cpu
import pytest
import support
import train_support
from train_support import Run, Samples, Workspace

FIXTURE = support.ROOT / "tests" / "bmtrain_cpu.py"
COMMON: dict[str, Any] = {"eval_interval": 5, "max_steps": 9, "epoch": 3, "lr": 0.003}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return train_support.make_workspace(tmp_path_factory.mktemp("workspace"))


def bmtrain(workspace: Workspace, save: Path, ranks: int, **values: Any) -> Run:
    flags = workspace.flags(save, engine="bmtrain", eval_dataset=workspace.eval, **values)
    script = str(support.ROOT / "src" / "finetune_cpm_bee.py")
    command = train_support.command(script, *flags, ranks=ranks, script=FIXTURE)
    save.mkdir(exist_ok=True)
    process = train_support.start(command, save, PYTHONPATH=str(support.ROOT / "src"))
    status, output, errors = train_support.finish(process, 250)
    assert status == 0, errors
    assert output.count(f"engine bmtrain, {ranks} process(es)") == 1
    return Run(save)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("delta", 2), ("full", 4)])
def test_the_script_trains_alike(
    workspace: Workspace, tmp_path: Path, kind: str, ranks: int
) -> None:
    bmtrain_cpu.require()
    flags = COMMON | {"use_delta": kind == "delta"}
    with train_support.one_thread():
        whole = {"eval_dataset": workspace.eval, "batch_size": 4, **flags}
        one = train_support.train(workspace, tmp_path / "torch", **whole)
        samples = Samples.of(one, workspace, **whole)
    other = bmtrain(workspace, tmp_path / "bmtrain", ranks, batch_size=4 // ranks, **flags)
    for name in ("token_accuracy", "exact_match", "records"):
        assert other.column(name, "eval") == one.column(name, "eval")
    samples.check(other)
    assert other.reason == one.reason


def test_without_a_gpu_the_engine_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    from cpm_bee.errors import InputError

    with pytest.raises(InputError, match="--engine torch runs anywhere"):
        train_support.train(workspace, tmp_path, engine="bmtrain")
