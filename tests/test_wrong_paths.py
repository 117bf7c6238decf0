"""Every path flag of every entry script, given a path that is not what it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import disk_support
import pytest
import train_support
from disk_support import run_here
from support import ROOT
from train_support import Workspace

from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CONFIG, CommandOptions
from cpm_bee.serve.options import ServeOptions
from cpm_bee.train.options import Options
from cpm_bee.train.plan.options import PlanOptions
from cpm_bee.train.replay_options import ReplayOptions

FILES = [  # flags that name a file to read
    ("text_generation", "--input"),
    ("text_generation", "--model-config"),
    ("text_generation", "--vocab"),
    ("text_generation", "--delta"),
    ("text_generation", "--examples"),
    ("finetune_cpm_bee", "--model-config"),
    ("finetune_cpm_bee", "--vocab"),
    ("finetune_cpm_bee", "--init-delta"),
    ("preprocess_dataset", "--vocab"),
    ("evaluate", "--model-config"),
    ("evaluate", "--vocab"),
    ("evaluate", "--delta"),
    ("evaluate", "--examples"),
    ("serve", "--model-config"),
    ("serve", "--vocab"),
    ("serve", "--delta"),
    ("merge_delta", "--vocab"),
    ("merge_delta", "--delta"),
    ("convert_checkpoint", "--vocab"),
    ("inspect_data", "--vocab"),
    ("verify", "--vocab"),
    ("verify", "--model-config"),
    ("verify", "--init-delta"),
    *(
        (script, "--config")
        for script in (
            *("finetune_cpm_bee", "text_generation", "preprocess_dataset", "evaluate", "serve"),
            *("merge_delta", "convert_checkpoint", "convert_data", "inspect_data", "verify"),
        )
    ),
]
FOLDERS = [("finetune_cpm_bee", "--dataset"), ("finetune_cpm_bee", "--eval-dataset")]
FOLDERS += [("verify", "--dataset"), ("verify", "--eval-dataset"), ("plan", "--dataset")]
EITHER = [  # a file, or a folder of files
    ("data_reformat", "--input"),
    ("preprocess_dataset", "--input"),
    ("convert_data", "--input"),
    ("inspect_data", "--input"),
    ("inspect_data", "--eval"),
    ("text_generation", "--load"),
    ("finetune_cpm_bee", "--load"),
    ("plan", "--load"),
    ("evaluate", "--load"),
    ("serve", "--load"),
    ("evaluate", "--dataset"),
    ("evaluate", "--train-dataset"),
    ("merge_delta", "--load"),
    ("convert_checkpoint", "--input"),
    ("convert_checkpoint", "--load"),
    ("verify", "--load"),
]
OUTPUT_FOLDERS = [
    ("data_reformat", "--output"),
    ("preprocess_dataset", "--output_path"),
    ("convert_data", "--output"),
    ("finetune_cpm_bee", "--save"),
    ("finetune_cpm_bee", "--tensorboard"),
    ("evaluate", "--output"),
    ("merge_delta", "--output"),
    ("convert_checkpoint", "--output"),
]
OUTPUTS = [*OUTPUT_FOLDERS, ("text_generation", "--output")]
OUTPUTS += [("inspect_data", "--html"), ("inspect_data", "--picture"), ("plan", "--json")]
NAMES = {
    **{"missing": "no such", "below a file": "no such", "link": "is a link to nowhere, which"},
    **{"loop": "too many levels of symbolic links", "long": "file name too long"},
    **{"pipe": "pipe"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("paths") / "all"
    workspace = train_support.make_workspace(folder)
    for name in ("raw", "bee"):
        (folder / name).mkdir()
    line = '{"translation": "a", "choices": ["b", "c"], "answer": 0}\n'
    (folder / "raw" / "train.jsonl").write_text(line)
    train_support.write_jsonl(folder / "bee" / "train.jsonl", train_support.records(3, 1))
    wrong = folder / "wrong"
    (wrong / "folder").mkdir(parents=True)
    (wrong / "file").write_text("x\n")
    (wrong / "link").symlink_to("nowhere")
    (wrong / "loop").symlink_to("loop")
    os.mkfifo(wrong / "pipe")
    tuned = {**train_support.DEFAULTS, "--dataset": workspace.train, "--load": workspace.model}
    tuned |= {"--save": folder / "tuned", "--max-steps": 1}
    (folder / "verify.yaml").write_text(f"receipt: {folder}/tuned-on/cpm_bee_finetune-receipt.json")
    with train_support.one_thread():
        done = run_here(
            "finetune_cpm_bee", "--use-delta", *(part for pair in tuned.items() for part in pair)
        )
        assert done.status == 0, done
        tuned |= {"--save": folder / "tuned-on"}
        tuned |= {"--init-delta": folder / "tuned" / "cpm_bee_finetune-delta-last.pt"}
        done = run_here(
            "finetune_cpm_bee", "--use-delta", *(part for pair in tuned.items() for part in pair)
        )
    assert done.status == 0, done
    return workspace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with train_support.one_thread():
        yield


def usual(place: Workspace, script: str, output: Path) -> dict[str, object]:
    """The flags of a command that succeeds, which writes below `output`."""
    folder = place.folder
    return {
        "data_reformat": {"--input": folder / "raw", "--output": output / "bee"},
        "preprocess_dataset": {
            "--input": folder / "bee",
            "--output_path": output / "bin",
            "--output_name": "data",
            "--vocab": "none",
            "--workers": 1,
        },
        "convert_data": {"--input": folder / "bee", "--output": output / "records"},
        "inspect_data": {
            "--input": folder / "bee" / "train.jsonl",
            "--vocab": place.vocabulary,
            "--html": output / "page.html",
            "--picture": output / "lengths.png",
        },
        "finetune_cpm_bee": {
            **train_support.DEFAULTS,
            "--dataset": place.train,
            "--eval-dataset": place.eval,
            "--load": place.model,
            "--save": output / "results",
            "--max-steps": 1,
        },
        "plan": {
            **train_support.DEFAULTS,
            "--dataset": place.train,
            "--load": place.model,
            "--json": output / "plan.json",
        },
        "text_generation": {
            "--input": folder / "bee" / "train.jsonl",
            "--output": output / "out.jsonl",
            "--load": place.model,
            "--max-length": 2,
            "--device": "cpu",
        },
        "evaluate": {
            "--dataset": folder / "bee" / "train.jsonl",
            "--output": output / "evaluation",
            "--load": place.model,
            "--max-length": 2,
            "--device": "cpu",
        },
        "serve": {"--load": place.model, "--port": 0, "--device": "cpu"},
        "merge_delta": {
            "--load": place.model,
            "--delta": folder / "tuned" / "cpm_bee_finetune-delta-last.pt",
            "--output": output / "merged",
        },
        "convert_checkpoint": {
            "--input": folder / "tuned" / "cpm_bee_finetune-delta-last.pt",
            "--load": place.model,
            "--to": "peft",
            "--output": output / "converted",
        },
        "verify": {"--config": folder / "verify.yaml"},  # which names the receipt
    }[script]  # type: ignore[return-value]


def refused(place: Workspace, output: Path, script: str, flag: str, given: object) -> str:
    """Run a command with one wrong path; returns the line of the error."""
    flags = {**usual(place, script, output), flag: given}
    before = sorted(p for p in output.rglob("*"))
    done = run_here(script, *(part for pair in flags.items() for part in pair))
    assert done.status == 2, done
    assert "Traceback" not in done.errors
    (line,) = [line for line in done.errors.splitlines() if str(given) in line][:1]
    assert sorted(p for p in output.rglob("*")) == before
    return line


@pytest.mark.parametrize(("script", "flag"), [*FILES, *FOLDERS, *EITHER])
def test_a_wrong_input(place: Workspace, tmp_path: Path, script: str, flag: str) -> None:
    wrong = place.folder / "wrong"
    for name, reason in NAMES.items():
        given = wrong / {"below a file": "file/x", "long": "x" * 300}.get(name, name)
        line = refused(place, tmp_path, script, flag, given)
        assert reason in line.lower(), line


@pytest.mark.parametrize(("script", "flag"), FILES)
def test_a_folder_for_a_file(place: Workspace, tmp_path: Path, script: str, flag: str) -> None:
    line = refused(place, tmp_path, script, flag, place.folder / "wrong" / "folder")
    assert "this is a folder" in line


@pytest.mark.parametrize(("script", "flag"), FOLDERS)
def test_a_file_for_a_folder(place: Workspace, tmp_path: Path, script: str, flag: str) -> None:
    line = refused(place, tmp_path, script, flag, place.folder / "wrong" / "file")
    assert "this is a file; a folder is needed" in line


@pytest.mark.parametrize(("script", "flag"), OUTPUTS)
def test_a_wrong_output(place: Workspace, tmp_path: Path, script: str, flag: str) -> None:
    wrong = place.folder / "wrong"
    folders = ("file", "pipe", "loop")
    for name in (
        "file/x",
        "x" * 300,
        *(folders if (script, flag) in OUTPUT_FOLDERS else ["folder"]),
    ):
        line = refused(place, tmp_path, script, flag, wrong / name)
        assert "error: " in line or line.startswith(f"  {flag} ")


@pytest.mark.parametrize(("script", "flag"), OUTPUTS)
def test_a_read_only_file_system(place: Workspace, tmp_path: Path, script: str, flag: str) -> None:
    with disk_support.tmpfs(tmp_path / "disk", options="ro") as folder:
        line = refused(place, tmp_path, script, flag, folder / "new")
    assert "read-only" in line.lower()


@pytest.mark.parametrize(("script", "flag"), OUTPUTS)
def test_a_link_to_what_is_to_be_made(
    place: Workspace, tmp_path: Path, script: str, flag: str
) -> None:
    """Is no mistake: the result is written to its target."""
    (tmp_path / "link").symlink_to("target")
    flags = {**usual(place, script, tmp_path), flag: tmp_path / "link"}
    done = run_here(script, *(part for pair in flags.items() for part in pair))
    assert done.status == 0, done
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").exists()


# ------------------------------------------------------------------ all flags are tried

PATHS = (
    "FILE",
    "FOLDER",
    "PATH",
    "CHECKPOINT",
    "FILE[=WEIGHT]",
    "FOLDER[=WEIGHT,...]",
    "auto|never|PATH",
)
# What the doctor is given to look at is a line of its table, not wrong usage. Its outputs are in
# tests/doctor; what `--resume` may be, in tests/train/test_states.py.
ELSEWHERE = {
    *(("doctor", f"--{name}") for name in ("load", "model-config", "vocab", "save", "json")),
    ("doctor", "--config"),  # read as for all others
    ("finetune_cpm_bee", "--resume"),
    # Checked by the same code for plan.py as for finetune_cpm_bee.py.
    *(("plan", f"--{name}") for name in ("model-config", "vocab", "eval-dataset", "init-delta")),
    *(("plan", f"--{name}") for name in ("save", "tensorboard", "resume")),
}
SCRIPTS: list[type[CommandOptions]] = [Options, TextGenerationOptions, PreprocessOptions]
SCRIPTS += [EvaluateOptions, MergeOptions, ConvertOptions, DoctorOptions, ServeOptions]
SCRIPTS += [ConvertDataOptions, InspectOptions, ReplayOptions, PlanOptions]


def test_every_flag_that_names_a_path_is_tried() -> None:
    assert {p.stem for p in (ROOT / "src").glob("*.py")} == {s.script[:-3] for s in SCRIPTS}
    named = {
        (options.script.removesuffix(".py"), flag.flag)
        for options in SCRIPTS
        for flag in (*options.flags(), CONFIG)
        if flag.metavar in PATHS
    }
    tried = {
        (script, flag.replace("_", "-"))
        for script, flag in [*FILES, *FOLDERS, *EITHER, *OUTPUTS]
        if script != "data_reformat"
    }
    assert named - tried == ELSEWHERE
    assert tried <= named
