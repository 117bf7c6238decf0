"""The settings and the receipt that a run leaves."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from disk_support import run_here
from train_support import Run, Workspace, after_steps, train

import cpm_bee
from cpm_bee.data.bin_checksums import CHECKSUMS
from cpm_bee.errors import InputError, InterruptedRun, RunError
from cpm_bee.train import digest, hashes
from cpm_bee.train.environment import code_of
from cpm_bee.train.options import Options
from cpm_bee.train.receipt_reader import read_receipt

NAME = "cpm_bee_finetune"


def receipt_of(folder: Path) -> dict[str, Any]:
    return read_receipt(folder / f"{NAME}-receipt.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------ the settings


def test_the_settings_of_a_run_repeat_it(workspace: Workspace, tmp_path: Path) -> None:
    first = train(workspace, tmp_path, use_delta=True, max_steps=2, delta_targets="w_0,w_1")
    config = tmp_path / "kept.yaml"
    shutil.copyfile(tmp_path / f"{NAME}-config.yaml", config)
    assert run_here("finetune_cpm_bee", "--config", config).status == 0
    second = Run(tmp_path)
    assert second.losses == first.losses and (tmp_path / f"{NAME}-previous").is_dir()
    options = [run.of("start")[0]["options"] for run in (first, second)]
    assert options[0] == options[1]
    text = config.read_text()
    assert "resume" not in text and "dry-run" not in text
    assert f"# Paths are those seen from {os.getcwd()}\n" in text


def test_the_settings_are_there_before_the_first_step(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(Options.parse(["--config", str(tmp_path / f"{NAME}-config.yaml")]))
        seen.append(receipt_of(tmp_path))

    after_steps(monkeypatch, 1, look)
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    options, receipt = seen
    assert (options.max_steps, options.use_delta, options.save) == (1, True, str(tmp_path))
    assert (receipt["status"], receipt["result"]) == ("running", None)


# ------------------------------------------------------------------ the receipt


def test_what_a_receipt_has(workspace: Workspace, tmp_path: Path) -> None:
    run = train(
        workspace, tmp_path, use_delta=True, eval_dataset=workspace.eval, eval_interval=2,
        max_steps=3, seed=11,
    )  # fmt: skip
    receipt = receipt_of(tmp_path)
    (part,), result = receipt["parts"], receipt["result"]
    assert receipt["status"] == "finished"
    assert part["settings"] == run.of("start")[0]["options"]
    (data,), (evaluation,) = part["data"]["dataset"], part["data"]["eval-dataset"]
    assert (data["path"], data["records"]) == (str(workspace.train), train_support.TRAINING)
    assert (evaluation["path"], evaluation["kind"]) == (str(workspace.eval), "sha256")
    base = workspace.model / "pytorch_model.bin"
    assert part["base"]["path"] == str(base)
    assert part["base"]["files"] == [
        {"name": base.name, "bytes": base.stat().st_size, "kind": "sha256", "value": sha256(base)}
    ]
    assert part["vocabulary"]["path"] == str(workspace.vocabulary)
    assert part["init_delta"] is None and part["folder"] == os.getcwd()
    environment = part["environment"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1
    assert (environment["device"], environment["ranks"]) == ("cpu", 1)
    best = min(run.of("eval"), key=lambda event: event["loss"])
    assert result["best_loss"] == best["loss"] and result["step"] == 3
    assert result["last_step"] == run.of("train")[-1]
    assert result["reason"] == run.reason
    for which in ("best", "last"):
        weights = result["weights"][which]
        assert weights["file"] == f"{NAME}-delta-{which}.pt"
        assert weights["value"] == sha256(tmp_path / weights["file"])
    log = tmp_path / f"{NAME}-log.jsonl"
    assert result["log"] == {"bytes": log.stat().st_size, "sha256": sha256(log)}


def test_a_mixture_and_a_first_delta(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace, tmp_path / "first", use_delta=True, max_steps=1)
    delta = tmp_path / "first" / f"{NAME}-delta-last.pt"
    mixture = f"{workspace.train}=2,{workspace.eval}=0.5"
    train(
        workspace, tmp_path / "run", use_delta=True, max_steps=1, dataset=mixture, init_delta=delta
    )
    (part,) = receipt_of(tmp_path / "run")["parts"]
    assert [(d["path"], d["weight"]) for d in part["data"]["dataset"]] == [
        (str(workspace.train), 2.0), (str(workspace.eval), 0.5),
    ]  # fmt: skip
    assert part["init_delta"] == {"path": str(delta), "sha256": sha256(delta)}


def test_runs_that_fail_and_runs_that_are_interrupted(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError):
        train(workspace, tmp_path / "failed", lr=1e30, weight_decay=0)
    receipt = receipt_of(tmp_path / "failed")
    assert receipt["status"] == "failed" and "finite" in receipt["result"]["reason"]
    after_steps(monkeypatch, 2, lambda: os.kill(os.getpid(), 15))
    with pytest.raises(InterruptedRun):
        train(workspace, tmp_path / "interrupted", use_delta=True)
    receipt = receipt_of(tmp_path / "interrupted")
    assert (receipt["status"], receipt["result"]["step"]) == ("interrupted", 3)
    assert receipt["result"]["weights"]["last"]["kind"] == "sha256"


def test_a_resumed_run_has_a_part_for_each_start(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=2)
    (first,) = receipt_of(tmp_path)["parts"]
    train(workspace, tmp_path, use_delta=True, max_steps=4, resume=True)
    parts = receipt_of(tmp_path)["parts"]
    assert parts[0] == first and [part["steps_before"] for part in parts] == [0, 2]
    assert [part["settings"]["max_steps"] for part in parts] == [2, 4]
    # From a state before the second part, which is left out then.
    state = tmp_path / f"{NAME}-state-2.pt"
    train(workspace, tmp_path, use_delta=True, max_steps=3, resume=state)
    parts = receipt_of(tmp_path)["parts"]
    assert [part["steps_before"] for part in parts] == [0, 2] and parts[0] == first
    assert parts[1]["settings"]["max_steps"] == 3
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    assert len(receipt_of(tmp_path)["parts"]) == 1


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_resuming_without_the_receipt_of_before(
    workspace: Workspace, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=2)
    path = tmp_path / f"{NAME}-receipt.json"
    path.unlink() if damage == "remove" else path.write_text("{}")
    train(workspace, tmp_path, use_delta=True, max_steps=3, resume=True)
    assert [part["steps_before"] for part in receipt_of(tmp_path)["parts"]] == [2]
    assert "the new receipt begins after step 2" in caplog.text


def test_no_finite_number_is_lost_and_others_are_null(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace, tmp_path, use_delta=True, max_steps=1)
    values = json.loads(
        (tmp_path / f"{NAME}-receipt.json").read_text(),
        parse_constant=lambda text: pytest.fail(f"{text} is not JSON"),
    )
    assert values["result"]["best_loss"] is None  # there was no evaluation
    assert math.isfinite(values["result"]["last_step"]["loss"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a receipt ("),
        ("[]", "not a receipt (SAVE_NAME-receipt.json is one)"),
        ('{"event": "start"}', "not a receipt (SAVE_NAME-receipt.json is one)"),
        ("[" * 100_000, "not a receipt ("),
        ('{"format": 1, "parts": []}', "has been changed since it was written"),
        (" " * (17 << 20), "not a receipt, but a file of 17,825,792 bytes"),
    ],
    ids=range(6),
)
def test_what_is_no_receipt(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "x-receipt.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_receipt(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


# ------------------------------------------------------------------ hashes


def test_large_files_are_not_read_where_checksums_are_stored(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SMALL", 0)
    read: list[Path] = []
    original = hashes.sha256_of
    monkeypatch.setattr(
        hashes, "sha256_of", lambda path, *a, **k: [read.append(path), original(path, *a, **k)][1]
    )
    train(workspace, tmp_path / "run", use_delta=True, max_steps=1)
    (part,) = receipt_of(tmp_path / "run")["parts"]
    assert part["base"]["files"][0]["kind"] == "stored-crc32"
    assert part["data"]["dataset"][0]["kind"] == "stored-crc32"
    assert {path.suffix for path in read} == {".pt"}  # the weights of the run itself


def test_other_large_files_are_read_in_the_background(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SMALL", 0)
    data = Path(shutil.copytree(workspace.train, tmp_path / "data"))
    (data / CHECKSUMS).unlink()
    done = run_here(
        "convert_checkpoint", "--input", workspace.model, "--to", "huggingface",
        "--output", tmp_path / "model",
    )  # fmt: skip
    assert done.status == 0, done
    flags = {"load": tmp_path / "model", "dataset": data, "use_delta": True, "max_steps": 1}
    train(workspace, tmp_path / "run", **flags)
    (part,) = receipt_of(tmp_path / "run")["parts"]
    (file,) = part["base"]["files"]
    path = tmp_path / "model" / "model.safetensors"
    assert (file["kind"], file["value"]) == ("sha256", sha256(path))
    assert part["data"]["dataset"][0]["kind"] == "sha256"
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256(path)}  {path.name}\n")
    train(workspace, tmp_path / "run", **flags)
    (file,) = receipt_of(tmp_path / "run")["parts"][0]["base"]["files"]
    assert (file["kind"], file["value"]) == ("stored-sha256", sha256(path))


def test_hashes_that_an_interruption_comes_before_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * (8 << 20))
    stopped = hashes.BackgroundHashes([path, path, path])
    stopped.stop()
    stopped.wait()
    assert len(stopped.found) <= 1  # of one file, which may have been read by then
    whole = hashes.BackgroundHashes([path, tmp_path / "missing"])
    whole.wait()
    assert whole.found == {path: sha256(path)}
    hashes.BackgroundHashes([]).wait()


# ------------------------------------------------------------------ digests and code


def test_digests_tell_single_bits_apart() -> None:
    tensors = {"a": torch.zeros(3, 2), "b": torch.ones(1)}
    known = digest.digest_of_tensors(tensors)
    assert known == digest.digest_of_tensors({"b": tensors["b"], "a": tensors["a"].clone()})
    assert known == digest.digest_of_tensors({**tensors, "a": torch.zeros(2, 3).t()})
    others: list[dict[str, torch.Tensor]] = [
        {**tensors, "a": -torch.zeros(3, 2)},
        {**tensors, "a": torch.zeros(2, 3)},
        {**tensors, "b": torch.ones(1, dtype=torch.float64)},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    found = [digest.digest_of_tensors(other) for other in others]
    assert len({known, *found}) == len(others) + 1


def test_too_many_values_have_no_digest(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_MOST", 1024)
    assert train(workspace, tmp_path / "delta", use_delta=True, max_steps=1).of("digest")
    assert train(workspace, tmp_path / "full", max_steps=1).of("digest") == []


def test_the_version_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "cpm_bee"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr("cpm_bee.train.environment.PACKAGE", package)
    first = code_of()
    assert (first["commit"], first["changed"]) == (None, None)  # in no repository
    assert code_of() == first
    (package / "__init__.py").write_text("a = 2\n")
    assert code_of()["source"] != first["source"]
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert code_of()["commit"] is None


def test_the_commit_of_this_repository(root: Path) -> None:
    found = code_of()
    assert len(found["source"]) == 64 and Path(cpm_bee.__file__).is_relative_to(root)
    if (root / ".git").exists() and shutil.which("git"):
        assert len(found["commit"]) == 40 and found["changed"] in (True, False)
