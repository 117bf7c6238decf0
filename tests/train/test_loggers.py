"""--report-to: what other projects' loggers are told, and what their faults do.

wandb, swanlab and trackio are stood for by modules with their documented functions; TensorBoard is
the real one (test_flags.py).
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from train_support import Workspace, train

from cpm_bee.errors import InputError
from cpm_bee.train.loggers import is_installed

# The signatures in their documentation (the pages that train/loggers.py names), as far as they go.
SIGNATURES = {
    "wandb": """
        def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
                 config=None, *, mode=None, resume=None, settings=None): record("init", locals())
        def log(data, step=None, commit=None): record("log", locals())
        def finish(exit_code=None, quiet=None): record("finish", locals())
    """,
    "swanlab": """
        def init(project=None, workspace=None, experiment_name=None, description=None,
                 job_type=None, group=None, tags=None, config=None, logdir=None, mode=None):
            record("init", locals())
        def log(data, step=None, print_to_console=False): record("log", locals())
        def finish(state=None, error=None): record("finish", locals())
    """,
    "trackio": """
        def init(project, name=None, group=None, space_id=None, config=None, resume="never"):
            record("init", locals())
        def log(metrics, step=None): record("log", locals())
        def finish(): record("finish", locals())
    """,
}
NAMES = {"wandb": "name", "swanlab": "experiment_name", "trackio": "name"}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages; each records its calls in `calls`, and fails in those of `broken`."""
    folder = tmp_path / "packages"
    for name, source in SIGNATURES.items():
        (folder / name).mkdir(parents=True)
        head = """
            calls, broken = [], {}
            def record(function, values):
                calls.append((function, values))
                if function in broken:
                    raise broken[function]
        """
        text = textwrap.dedent(head) + textwrap.dedent(source)
        (folder / name / "__init__.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    for variable in ("WANDB_PROJECT", "SWANLAB_PROJ_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    for name in SIGNATURES:
        sys.modules.pop(name, None)


def calls_of(name: str, function: str) -> list[dict[str, Any]]:
    return [values for called, values in sys.modules[name].calls if called == function]


def test_all_of_them_get_the_figures_of_each_step(
    workspace: Workspace, tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "poems")
    run = train(
        workspace, tmp_path / "run", use_delta=True, max_steps=3, eval_dataset=workspace.eval,
        eval_interval=2, report_to="wandb,swanlab,trackio", save_name="mine", lr=0.02,
    )  # fmt: skip
    for name in SIGNATURES:
        [init] = calls_of(name, "init")
        assert init["project"] == ("poems" if name == "wandb" else "cpm_bee")
        assert init[NAMES[name]] == "mine" and init["config"]["lr"] == 0.02
        logged = calls_of(name, "log")
        data = next(iter(inspect.signature(sys.modules[name].log).parameters))
        training = [c for c in logged if "train/loss" in c[data]]
        assert [c["step"] for c in training] == [1, 2, 3]
        assert [c[data]["train/loss"] for c in training] == run.losses
        evaluations = [c for c in logged if "eval/exact_match" in c[data]]
        assert [c["step"] for c in evaluations] == [0, 2, 3]
        assert [c["step"] for c in logged] == sorted(c["step"] for c in logged)
        assert len(calls_of(name, "finish")) == 1


def test_a_logger_that_refuses_to_start_ends_the_run_before_its_first_step(
    workspace: Workspace, tmp_path: Path, packages: Path
) -> None:
    for error in (ValueError("no API key\nlog in"), SystemExit(1)):
        module = __import__("wandb")
        module.broken["init"] = error
        with pytest.raises(InputError) as caught:
            train(workspace, tmp_path / "run", use_delta=True, max_steps=1, report_to="wandb")
        assert str(caught.value).startswith("--report-to wandb: ")
        assert "WANDB_MODE=offline" in str(caught.value) and "\n" not in str(caught.value)


def test_a_logger_that_fails_later_is_left_out(
    workspace: Workspace, tmp_path: Path, packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    __import__("trackio").broken["log"] = ConnectionError("the server is gone")
    flags = {"use_delta": True, "max_steps": 3, "report_to": "trackio"}
    run = train(workspace, tmp_path / "run", **flags)
    assert run.column("step") == [1, 2, 3]
    [warning] = [r.getMessage() for r in caplog.records if "trackio" in r.getMessage()]
    assert warning == "--report-to trackio: the server is gone; the run goes on without it"
    assert len(calls_of("trackio", "log")) == 1


def test_a_folder_of_the_same_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb makes a folder `wandb` where it runs."""
    (tmp_path / "no_such_tracker" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("no_such_tracker") and not is_installed("nothing_at_all")
    (tmp_path / "no_such_tracker" / "__init__.py").touch()
    assert is_installed("no_such_tracker")


def test_unknown_names_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'mlflow' is no logger; there are tensorboard, wandb"):
        train(workspace, tmp_path, report_to="wandb,mlflow")
