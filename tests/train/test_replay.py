"""A run done again by its receipt: it agrees bit for bit, or the step and the reason are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk_support
import pytest
import torch
import train_support
from train_support import Run, Workspace, after_steps, train

from cpm_bee import checksums
from cpm_bee.checkpoint import reader
from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.errors import InputError, InterruptedRun
from cpm_bee.train import hashes
from cpm_bee.train.replay import verify
from cpm_bee.train.replay_options import ReplayOptions
from cpm_bee.train.replay_report import compare_digests, compare_steps, reasons_to_differ

NAME = "cpm_bee_finetune"
EQUAL = "loss, gradient norm, learning rate and tokens: equal bit for bit in all steps"


def receipt_of(folder: Path) -> Path:
    return folder / f"{NAME}-receipt.json"


def again(folder: Path, *flags: object) -> tuple[list[str], int]:
    """The lines of verify.py without the first one, and its exit status."""
    text, status = verify(ReplayOptions.parse([str(receipt_of(folder)), *map(str, flags)]))
    first, *lines = text.splitlines()
    assert first.startswith(f"{receipt_of(folder)}: ")
    return lines, status


def refused(folder: Path, *flags: object) -> str:
    with pytest.raises(InputError) as caught:
        again(folder, *flags)
    return str(caught.value)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a receipt as if the run had written it so."""
    path = receipt_of(folder)
    values = json.loads(path.read_text())
    edit(values)
    values.pop(checksums.SEAL)
    path.write_text(json.dumps(checksums.sealed(values)))


def set_setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda receipt: receipt["parts"][0]["settings"].update({name: value})


@pytest.fixture(scope="session")
def made(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations that has stopped early, after 4 steps."""
    folder = tmp_path_factory.mktemp("made") / "run"
    with train_support.one_thread():
        run = train(
            workspace, folder, use_delta=True, eval_dataset=workspace.eval, eval_interval=2,
            lr=1e-30, early_stop_patience=2,
        )  # fmt: skip
    assert run.reason.startswith("early stop") and len(run.losses) == 4
    return folder


@pytest.fixture(scope="session")
def learned(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps that learns."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    with train_support.one_thread():
        train(workspace, folder, use_delta=True, max_steps=3)
    return folder


@pytest.fixture
def run(learned: Path, tmp_path: Path) -> Path:
    """A copy of `learned`, to be changed."""
    return Path(shutil.copytree(learned, tmp_path / "copy"))


# ------------------------------------------------------------------ agrees


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_run_that_stopped_early_agrees(made: Path, steps: int) -> None:
    lines, status = again(made, "--steps", steps)
    done = min(steps, 4)
    after = {1: "0, 1", 3: "0, 1, 2", 4: "0, 1, 2, 4"}[done]
    assert lines == [
        "beforehand, inputs, code and environment are those of the run",
        EQUAL,
        f"trained tensors: equal bit for bit after {after} steps",
        f"agrees: the first {done} steps are those of the run, bit for bit",
    ]
    assert status == 0


def mixture(workspace: Workspace, folder: Path) -> dict[str, Any]:
    return {"dataset": f"{workspace.train}=2,{workspace.eval}=0.5", "use_delta": True}


def quantized(workspace: Workspace, folder: Path) -> dict[str, Any]:
    model = shutil.copytree(workspace.model, folder / "model")
    return {"load": model, "quantize": "int8", "use_delta": True}


def from_a_delta(workspace: Workspace, folder: Path) -> dict[str, Any]:
    first = train(workspace, folder / "first", use_delta=True, max_steps=1, delta_rank=3)
    delta = first.save / f"{NAME}-delta-last.pt"
    return {"init_delta": delta, "use_delta": True, "delta_dropout": 0.3}


def random_start(workspace: Workspace, folder: Path) -> dict[str, Any]:
    config = workspace.model / "config.json"
    return {"load": None, "model_config": config, "vocab": workspace.vocabulary}


def in_pieces(workspace: Workspace, folder: Path) -> dict[str, Any]:
    return {"accumulate": 2, "max_tokens": 60, "dtype": "bf16", "checkpointing": "full"}


@pytest.mark.parametrize("kind", [mixture, quantized, from_a_delta, random_start, in_pieces])
def test_runs_of_all_kinds_agree(
    workspace: Workspace, tmp_path: Path, kind: Callable[[Workspace, Path], dict[str, Any]]
) -> None:
    train(workspace, tmp_path / "run", max_steps=3, **kind(workspace, tmp_path))
    lines, status = again(tmp_path / "run")
    assert (lines[0], lines[1], status) == (
        "beforehand, inputs, code and environment are those of the run", EQUAL, 0,
    )  # fmt: skip
    assert lines[2] == "trained tensors: equal bit for bit after 0, 1, 2, 3 steps"


def test_interrupted_and_resumed_runs_agree(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        after_steps(patch, 2, lambda: os.kill(os.getpid(), 15))
        with pytest.raises(InterruptedRun):
            train(workspace, tmp_path, use_delta=True)
    assert again(tmp_path)[1] == 0
    train(workspace, tmp_path, use_delta=True, resume=True)
    lines, status = again(tmp_path)
    assert status == 0 and lines[-1].startswith("agrees: the first 8 steps")


def test_steps_after_a_resume_with_other_settings_are_left_out(
    workspace: Workspace, run: Path
) -> None:
    train(workspace, run, use_delta=True, max_steps=5, lr=0.3, resume=True)
    assert again(run)[0][-1] == "agrees: the first 3 steps are those of the run, bit for bit"


@pytest.mark.slow
def test_two_ranks_with_parts_of_the_model(workspace: Workspace, tmp_path: Path) -> None:
    flags = workspace.flags(
        tmp_path / "run", use_delta=True, batch_size=2, max_steps=3, parallel="fsdp"
    )
    command = train_support.command(*flags, ranks=2)
    status, output, errors = train_support.finish(train_support.start(command, tmp_path))
    assert status == 0, output + errors
    receipt = json.loads(receipt_of(tmp_path / "run").read_text())
    environment = receipt["parts"][0]["environment"]
    assert (environment["ranks"], environment["sharded"]) == (2, True)
    lines, status = again(tmp_path / "run")
    reason = "bit equality is not to be expected: its weights were sharded, and norms summed"
    assert status == 0 or any(line.startswith(reason) for line in lines), lines
    losses = [line for line in lines if line.startswith("loss: ")]
    assert all(float(line.partition("at most by ")[2].split()[0]) < 1e-3 for line in losses)


@pytest.mark.slow
def test_two_ranks_agree_with_one_process(workspace: Workspace, tmp_path: Path) -> None:
    flags = workspace.flags(tmp_path / "run", use_delta=True, batch_size=2, max_steps=4)
    command = train_support.command(*flags, ranks=2)
    status, output, errors = train_support.finish(train_support.start(command, tmp_path))
    assert status == 0, output + errors
    lines, status = again(tmp_path / "run")
    assert EQUAL in lines and status == 0, lines


# ------------------------------------------------------------------ differs


def test_another_learning_rate(run: Path) -> None:
    change(run, set_setting("lr", 0.02))
    lines, status = again(run)
    losses, *_ = (line for line in lines if line.startswith("loss: "))
    assert losses.startswith("loss: differs from step 2 on: ") and "2 of 3 steps differ" in losses
    (rates,) = (line for line in lines if line.startswith("learning rate: "))
    assert rates.startswith("learning rate: differs from step 1 on: 0.01 in the run, 0.02 here")
    assert rates.endswith(", by 0.01; 3 of 3 steps differ, at most by 0.01 (step 3)")
    assert "trained tensors: equal bit for bit after 0 steps" in lines
    (weights,) = (line for line in lines if line.startswith("trained tensors: different after 1"))
    amount = float(weights.partition("at most by ")[2].split()[0])
    assert 0 < amount < 1 and ".lora.lora_" in weights
    assert (lines[-1], status) == ("differs", 1)


def test_another_seed(run: Path) -> None:
    change(run, set_setting("seed", 8))
    lines, status = again(run)
    assert any(line.startswith("loss: differs from step 1 on: ") for line in lines)
    assert any(line.startswith("trained tensors: different after 0 steps") for line in lines)
    assert status == 1


def test_other_data(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    other = train_support.make_dataset(tmp_path, "other", train_support.records(60, seed=5))
    lines, status = again(run, "--dataset", other)
    assert lines[0] == (
        f"different beforehand: data: {other} is not what the run read (60 records then, 60 now)"
    )
    assert "base" not in " ".join(lines) and status == 1


def test_other_evaluation_data_changes_no_step(
    workspace: Workspace, made: Path, tmp_path: Path
) -> None:
    other = train_support.make_dataset(tmp_path, "other", train_support.records(5, seed=5))
    lines, status = again(made, "--eval-dataset", other)
    assert lines[0].startswith(f"different beforehand: evaluation data: {other} is not what")
    assert status == 0


def test_another_base(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    train_support.make_model(tmp_path / "other", seed=4)
    lines, status = again(run, "--load", tmp_path / "other")
    assert lines[0] == (
        f"different beforehand: base: {tmp_path / 'other' / 'pytorch_model.bin'} has other "
        "weights than the base of the run"
    )
    assert "data" not in lines[0] and status == 1


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fingerprints cover only a part of the tensors, as they do for models of real size."""
    monkeypatch.setattr(reader, "_SAMPLED", 4)


def changed_inside(model: Path) -> Path:
    """Change a value in the middle of a tensor, which the fingerprint does not cover."""
    path = model / "pytorch_model.bin"
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path, "it").items()}
    name = "encoder.layers.0.ffn.ffn.w_out.weight"
    tensors[name].view(-1)[tensors[name].numel() // 2] += 1
    save_tensors(path, tensors)
    return path


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize("small", [hashes.SMALL, 0])
def test_a_base_with_one_other_value(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(hashes, "SMALL", small)
    model = Path(shutil.copytree(workspace.model, tmp_path / "model"))
    train(workspace, tmp_path / "run", load=model, use_delta=True, max_steps=1)
    changed_inside(model)
    lines, status = again(tmp_path / "run")
    expected = f"base: pytorch_model.bin in {model} has other bytes than in the run"
    assert lines[0] == f"different beforehand: {expected}" and status == 1


@pytest.mark.usefixtures("short_samples")
def test_a_damaged_base_and_damaged_data_whose_checksums_are_as_before(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SMALL", 0)  # as for large files
    model = Path(shutil.copytree(workspace.model, tmp_path / "model"))
    data = Path(shutil.copytree(workspace.train, tmp_path / "data"))
    train(workspace, tmp_path / "run", load=model, dataset=data, use_delta=True, max_steps=1)
    path = model / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (file,) = (p for p in data.iterdir() if p.is_file() and p.stat().st_size == 1 << 20)
    with open(file, "r+b") as stream:
        stream.seek(1 << 19)  # between the records and the end, which nobody reads
        stream.write(b"x")
    lines, _ = again(tmp_path / "run")
    before = [line for line in lines if line.startswith("different beforehand: ")]
    assert len(before) == 2
    assert before[0].startswith(f"different beforehand: data: {file}: bytes ")
    assert before[1].startswith(f"different beforehand: base: {path}: damaged: ")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("torch", "1.0", f"PyTorch: 1.0 then, {torch.__version__} now"),
        ("cpu", "8086", "CPU: 8086 then, "),
        ("variables", {"MKL_CBWR": "AVX2"}, "variables: {'MKL_CBWR': 'AVX2'} then, {"),
    ],
)
def test_another_environment_is_named(run: Path, name: str, value: Any, line: str) -> None:
    change(run, lambda receipt: receipt["parts"][0]["environment"].update({name: value}))
    lines, status = again(run)
    assert lines[0].startswith(f"different beforehand: {line}") and status == 0


def test_another_source_is_named(run: Path) -> None:
    code = {"source": "0", "commit": "0123456789abcdef", "changed": True}
    change(run, lambda receipt: receipt["parts"][0].update(code=code))
    line = again(run)[0][0]
    assert "code: the source of cpm_bee has changed (commit 0123456789ab+ then, " in line


def test_another_number_of_threads(run: Path) -> None:
    assert again(run, "--threads", 2)[0][0] == "different beforehand: threads: 1 then, 2 now"
    assert torch.get_num_threads() == 1


def test_a_changed_log_is_told_from_a_changed_run(run: Path) -> None:
    log = run / f"{NAME}-log.jsonl"
    log.write_text(log.read_text().replace('"loss": 3', '"loss": 4', 1))
    lines, status = again(run)
    assert lines[0] == f"different beforehand: log: {log} has changed since the run ended"
    assert "loss: differs from step 1 on" in lines[1] and ", by 1;" in lines[1]
    assert "trained tensors: equal bit for bit after 0, 1, 2, 3 steps" in lines and status == 1


# ------------------------------------------------------------------ cannot be used


def test_a_changed_receipt_is_refused(run: Path) -> None:
    path = receipt_of(run)
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    assert "has been changed since it was written (checksum)" in refused(run)


def test_files_that_have_moved(workspace: Workspace, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    moved = Workspace(Path(shutil.copytree(workspace.folder, old)))
    train(moved, tmp_path / "run", use_delta=True, max_steps=1, eval_dataset=moved.eval)
    old.rename(new)
    message = refused(tmp_path / "run").splitlines()
    assert message == [
        f"{receipt_of(tmp_path / 'run')}: files of the run are missing:",
        f"  {old}/bin_data/train: no such folder; if it is elsewhere now, give --dataset",
        f"  {old}/model/pytorch_model.bin: no such checkpoint; if it is elsewhere now, give --load",
        f"  {old}/model/vocab.txt: no such vocabulary; if it is elsewhere now, give --vocab",
    ]
    found = ["--dataset", new / "bin_data" / "train", "--load", new / "model"]
    assert again(tmp_path / "run", *found)[0][0] == (
        f"different beforehand: evaluation data: {old}/bin_data/eval is not there, so it has not "
        "been compared"
    )
    lines, status = again(tmp_path / "run", *found, "--eval-dataset", new / "bin_data" / "eval")
    assert lines[0].startswith("beforehand, inputs") and status == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["parts"][0].update(steps_before=2), "how the first steps of this run were"),
        (lambda r: r.update(parts=[]), "how the first steps of this run were done"),
        (lambda r: r.update(format=9), "has format 9, this version reads 1"),
        (lambda r: r["parts"][0].pop("base"), "/parts/0/base is None"),
        (lambda r: r["parts"][0]["environment"].update(threads=0), "a run with 0 threads"),
        (lambda r: r["parts"][0]["environment"].update(ranks=10**9), "a run with 1000000000 ranks"),
        (lambda r: r["parts"][0]["environment"].pop("ranks"), "/parts/0/environment/ranks is None"),
        (lambda r: r["parts"][0]["data"].update(dataset=[1]), "/parts/0/data/dataset/0 is 1"),
        (lambda r: r.update(result=[]), "/result is []"),
        (set_setting("new_flag", 1), "new_flag: is a setting that this version does not know"),
        (set_setting("lr", "x"), "--lr: 'x' is not a number"),
        (set_setting("lr", [1]), "--lr: is a list; expected one value"),
        (set_setting("use_delta", 1), "--use-delta: '1' is neither true nor false"),
        (set_setting("clip_grad", {}), "--clip-grad: is a mapping; expected one value"),
    ],
)
def test_receipts_that_cannot_be_used(
    run: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(run, edit)
    assert message in refused(run)


def test_without_a_log(run: Path) -> None:
    (run / f"{NAME}-log.jsonl").write_text('{"event": "start"}\n')
    assert "there are no steps in it" in refused(run)
    (run / f"{NAME}-log.jsonl").unlink()
    assert f"{NAME}-log.jsonl: no such log; it has the losses" in refused(run)


def test_one_process_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert refused(run) == "verify.py is one process: start it without torchrun"


def test_a_delta_for_a_run_without_one(run: Path) -> None:
    assert "--init-delta: this run began with a new delta" in refused(run, "--init-delta", run)


def test_exit_status_of_the_script(run: Path, tmp_path: Path) -> None:
    assert disk_support.run_here("verify", receipt_of(run)).status == 0
    change(run, set_setting("lr", 0.02))
    done = disk_support.run_here("verify", receipt_of(run))
    assert (done.status, done.output.splitlines()[-1]) == (1, "differs")
    for wrong in (tmp_path / "none", tmp_path, receipt_of(run).with_name(f"{NAME}-log.jsonl")):
        done = disk_support.run_here("verify", wrong)
        assert done.status == 2 and done.errors.startswith(f"error: {wrong}: "), done


# ------------------------------------------------------------------ what can be expected

ONE = {"device": "cpu", "ranks": 1, "sharded": False, "dtype": "float32"}
PLAIN = {"accumulate": 1, "max_tokens": None}


@pytest.mark.parametrize(
    ("environment", "settings", "datasets", "dropout", "reasons"),
    [
        ({}, {}, 1, True, []),
        ({"ranks": 2}, {}, 1, False, []),
        ({"ranks": 2}, {}, 1, True, ["dropout masks"]),
        ({"ranks": 2}, {"accumulate": 2}, 1, False, ["another order"]),
        ({"ranks": 2}, {"max_tokens": 9}, 1, False, ["another order"]),
        ({"ranks": 2}, {}, 2, False, ["another order"]),
        ({"ranks": 3}, {}, 1, False, ["its 3 ranks"]),
        ({"ranks": 2, "sharded": True}, {}, 1, False, ["sharded"]),
        ({"device": "cuda", "gpu": "H200"}, {}, 1, False, ["made on H200 in float32"]),
        ({"device": "cuda", "ranks": 4}, {}, 1, True, ["made on cuda", "dropout", "order"]),
    ],
)
def test_reasons_to_differ(
    environment: dict[str, Any],
    settings: dict[str, Any],
    datasets: int,
    dropout: bool,
    reasons: list[str],
) -> None:
    data = {"dataset": [{}] * datasets}
    part = {"environment": ONE | environment, "data": data, "settings": PLAIN | settings}
    found = reasons_to_differ(part, dropout=dropout)
    assert len(found) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, found, strict=True))


def test_steps_are_compared_with_their_amounts() -> None:
    then = {s: {"loss": 2.0, "lr": 1.0} for s in (1, 2, 3)}
    now = {1: {"loss": 2.0, "lr": 1.0}, 2: {"loss": 2.25, "lr": 1.0}, 3: {"loss": 1.0, "lr": None}}
    assert compare_steps(then, now, 1) == []
    assert compare_steps(then, now, 3) == [
        "loss: differs from step 2 on: 2.0 in the run, 2.25 here, by 0.25; 2 of 3 steps differ, "
        "at most by 1 (step 3)",
        "learning rate: differs from step 3 on: 1.0 in the run, None here",
    ]
    assert compare_digests({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "x", 2: "c", 5: "d"}) == ([0], 1)
    assert compare_digests({}, {0: "a"}) == ([], None)


def test_a_receipt_moved_with_its_run(workspace: Workspace, run: Path) -> None:
    """As into the folder of earlier runs."""
    train(workspace, run, use_delta=True, max_steps=1)
    assert again(run / f"{NAME}-previous")[1] == 0
    assert Run(run).losses[0] == Run(run / f"{NAME}-previous").losses[0]
