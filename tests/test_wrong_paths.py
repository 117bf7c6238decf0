"""Every path flag of every entry script, given a path that is not what it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import disk_support
import pytest
import train_support
from disk_support import run_here
from train_support import Workspace

FILES = [  # flags that name a file to read
    ("text_generation", "--input"),
    ("text_generation", "--model-config"),
    ("text_generation", "--vocab"),
    ("text_generation", "--delta"),
    ("finetune_cpm_bee", "--model-config"),
    ("finetune_cpm_bee", "--vocab"),
    ("preprocess_dataset", "--vocab"),
]
FOLDERS = [("finetune_cpm_bee", "--dataset"), ("finetune_cpm_bee", "--eval-dataset")]
EITHER = [  # a file, or a folder of files
    ("data_reformat", "--input"),
    ("preprocess_dataset", "--input"),
    ("text_generation", "--load"),
    ("finetune_cpm_bee", "--load"),
]
OUTPUT_FOLDERS = [
    ("data_reformat", "--output"),
    ("preprocess_dataset", "--output_path"),
    ("finetune_cpm_bee", "--save"),
    ("finetune_cpm_bee", "--tensorboard"),
]
OUTPUTS = [*OUTPUT_FOLDERS, ("text_generation", "--output")]
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
        "finetune_cpm_bee": {
            **train_support.DEFAULTS,
            "--dataset": place.train,
            "--eval-dataset": place.eval,
            "--load": place.model,
            "--save": output / "results",
            "--max-steps": 1,
        },
        "text_generation": {
            "--input": folder / "bee" / "train.jsonl",
            "--output": output / "out.jsonl",
            "--load": place.model,
            "--max-length": 2,
            "--device": "cpu",
        },
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
    refused(place, tmp_path, script, flag, wrong / "file" / "x")
    refused(place, tmp_path, script, flag, wrong / ("x" * 300))
    if (script, flag) in OUTPUT_FOLDERS:
        refused(place, tmp_path, script, flag, wrong / "file")
        refused(place, tmp_path, script, flag, wrong / "pipe")
        refused(place, tmp_path, script, flag, wrong / "loop")
    else:
        refused(place, tmp_path, script, flag, wrong / "folder")


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
