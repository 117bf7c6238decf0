"""Every flag of finetune_cpm_bee.py has its effect, or is refused: a flag without a case fails."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
import train_support
from torch.nn.attention import flex_attention as torch_flex
from train_support import Run, Workspace, distance

from cpm_bee.checkpoint.reader import load_tensors
from cpm_bee.cli import not_negative, positive, run_command, whole_number
from cpm_bee.data.batch import Batch
from cpm_bee.errors import InputError
from cpm_bee.model import compiled, flex_attention, flex_probe
from cpm_bee.model.attention import PaddedAttention
from cpm_bee.model.network import BlockStack, CPMBee
from cpm_bee.train import activation_checkpointing, trainer
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.evaluation import Evaluation
from cpm_bee.train.options import Options
from cpm_bee.train.schedules import STYLES, learning_rate
from cpm_bee.train.setup import finetune

parser = Options.parser


class Lab:
    """Runs of two steps of delta tuning, each in a folder of its own."""

    def __init__(
        self,
        workspace: Workspace,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.workspace = workspace
        self.folder = folder
        self.patch = monkeypatch
        self.printed = ""  # of the last run
        self._capsys = capsys
        self._runs = 0

    def new_folder(self) -> Path:
        self._runs += 1
        return self.folder / f"run-{self._runs}"

    def run(self, **values: Any) -> Run:
        values = {"use_delta": True, "max_steps": 2, "save": self.new_folder(), **values}
        result = train_support.train(self.workspace, values.pop("save"), **values)
        self.printed = self._capsys.readouterr().out
        return result

    def errors(self) -> str:
        return self._capsys.readouterr().err

    def refusal(self, **values: Any) -> str:
        save = self.new_folder()
        with pytest.raises(InputError) as caught:
            self.run(save=save, **values)
        assert not save.exists()
        return str(caught.value)


@pytest.fixture
def lab(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Lab:
    return Lab(workspace, tmp_path, capsys, monkeypatch)


CASES: dict[str, Callable[[Lab], None]] = {}


def case(function: Callable[[Lab], None]) -> Callable[[Lab], None]:
    name = function.__name__.lstrip("_")
    assert name not in CASES, f"two cases for --{name}"
    CASES[name] = function
    return function


def flags() -> list[argparse.Action]:
    return [action for action in parser()._actions if action.dest != "help"]


SLOW = ("compile", "checkpointing", "report")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(action.dest, marks=pytest.mark.slow if action.dest in SLOW else ())
        for action in flags()
    ],
)
def test_flag(lab: Lab, name: str) -> None:
    assert name in CASES, "write a case for this flag below"
    CASES[name](lab)


@case
def _lang(lab: Lab) -> None:
    arguments = lab.workspace.flags(lab.folder / "none", load=lab.folder / "missing")
    for language, words in (
        ("zh", "没有这个检查点"),
        ("en", "no such checkpoint"),
    ):  # English is left
        lab.patch.setattr(sys, "argv", ["finetune_cpm_bee.py", *arguments, "--lang", language])
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: finetune(Options.parse()))
        assert caught.value.code == 2 and words in lab.errors()


@case
def _debug(lab: Lab) -> None:
    arguments = lab.workspace.flags(lab.folder / "none", load=lab.folder / "missing")

    def main() -> None:
        finetune(Options.parse())

    lab.patch.setattr(sys, "argv", ["finetune_cpm_bee.py", *arguments])
    with pytest.raises(SystemExit):
        run_command(main)
    lab.patch.setattr(sys, "argv", ["finetune_cpm_bee.py", *arguments, "--debug"])
    with pytest.raises(InputError):  # which the interpreter shows with its traceback
        run_command(main)


@case
def _config(lab: Lab) -> None:
    path = lab.folder / "run.yaml"
    path.write_text("max_steps: 3\nlr: 1e-3\n")
    assert lab.run(config=path, max_steps=None, lr=None).column("lr") == [1e-3] * 3
    assert lab.run(config=path, max_steps=1).column("lr") == [0.01]  # given by both
    path.write_text("max_steps: 3\nlearning-rate: 1e-3\n")
    assert f"{path}:2: unknown setting 'learning-rate' (did you mean lr?)" in lab.refusal(
        config=path
    )


@case
def _model_config(lab: Lab) -> None:
    automatic, given = lab.run(), lab.run(model_config=lab.workspace.model / "config.json")
    assert automatic.losses == given.losses
    path = lab.folder / "other.json"
    path.write_text(json.dumps(replace(train_support.CONFIG, num_heads=4, dim_ff=8).to_dict()))
    message = lab.refusal(model_config=path)
    assert "num_heads" in message and "dim_ff" in message
    with_dropout = replace(train_support.CONFIG, dropout_p=0.5)
    path.write_text(json.dumps(with_dropout.to_dict()))
    assert lab.run(model_config=path).losses != automatic.losses


@case
def _load(lab: Lab) -> None:
    train_support.make_model(lab.folder / "other", seed=4)
    other = lab.run(load=lab.folder / "other")
    assert other.losses[0] != lab.run().losses[0]
    random = lab.run(
        load=None, use_delta=None, vocab=lab.workspace.vocabulary,
        model_config=lab.workspace.model / "config.json", seed=4,
    )  # fmt: skip
    assert random.losses[0] != other.losses[0]
    assert "--load" in lab.refusal(load=None)  # a delta of random weights is of no use


@case
def _vocab(lab: Lab) -> None:
    path = lab.folder / "vocab.txt"
    path.write_text("\n".join(train_support.TOKENS[:-1]))
    count = len(train_support.TOKENS)
    message = lab.refusal(vocab=path)
    assert f"has {count - 1} tokens" in message and f"has {count}" in message
    path.write_text("\n".join([*train_support.TOKENS[:-30], *train_support.TOKENS[:-31:-1]]))
    assert lab.run(vocab=path).losses != lab.run().losses


@case
def _quantize(lab: Lab) -> None:
    model = Path(shutil.copytree(lab.workspace.model, lab.folder / "model"))
    plain, parameters = lab.run(load=model), re.findall(r"model with \S+", lab.printed)
    quantized = lab.run(load=model, quantize="int8")
    assert (model / "pytorch_model.int8.safetensors").is_file()
    assert quantized.losses != plain.losses
    assert quantized.losses == pytest.approx(plain.losses, rel=0.02)
    assert re.findall(r"model with \S+", lab.printed) == parameters
    assert "64" in lab.refusal(load=model, quantize="nf4")  # its layers are too small
    assert "--use-delta" in lab.refusal(load=model, quantize="int8", use_delta=None)


@case
def _verify(lab: Lab) -> None:
    model = Path(shutil.copytree(lab.workspace.model, lab.folder / "model"))
    path = model / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lab.run(load=model)
    assert f"{path}: damaged" in lab.refusal(load=model, verify=True)
    lab.run(verify=True)
    random = {"use_delta": None, "load": None, "vocab": lab.workspace.vocabulary}
    config = lab.workspace.model / "config.json"
    assert "--verify: needs" in lab.refusal(**random, model_config=config, verify=True)


@case
def _dataset(lab: Lab) -> None:
    other = train_support.make_dataset(lab.folder, "other", train_support.records(4, seed=9))
    run = lab.run(dataset=other, max_steps=None)
    assert "training: 4 records" in lab.printed
    assert sum(run.column("tokens")) < 4 * 64
    assert "preprocess_dataset.py" in lab.refusal(dataset=lab.folder / "none")


@case
def _eval_dataset(lab: Lab) -> None:
    assert lab.run().of("eval") == []
    run = lab.run(eval_dataset=lab.workspace.eval)
    assert run.column("records", "eval") == [train_support.EVALUATION] * 2
    assert "preprocess_dataset.py" in lab.refusal(eval_dataset=lab.folder / "none")


@case
def _max_length(lab: Lab) -> None:
    run = lab.run(max_length=30, max_steps=None)
    assert "longer than --max-length 30" in lab.printed
    assert max(run.column("tokens")) <= 4 * 30


@case
def _incontext_weights(lab: Lab) -> None:
    usual = lab.run(eval_dataset=lab.workspace.eval)
    run = lab.run(eval_dataset=lab.workspace.eval, incontext_weights="0,1")
    assert "in-context samples of the first epoch: 5" in lab.printed
    assert run.losses != usual.losses
    assert run.column("loss", "eval")[0] == usual.column("loss", "eval")[0]
    assert max(run.column("tokens")) <= 4 * 64
    told = lab.refusal(incontext_weights="0.5,-1,x,")
    assert "-1 is not at least 0" in told and "'x' is not a number" in told and "'' is" in told
    assert "0.7,0.2 add up to 0.9, not to 1" in lab.refusal(incontext_weights="0.7,0.2")


@case
def _drop_last(lab: Lab) -> None:
    values = {"max_steps": None, "max_length": 48}
    whole, dropped = lab.run(**values), lab.run(drop_last=True, **values)
    assert whole.losses[:-1] == dropped.losses
    assert "--drop-last leaves nothing" in lab.refusal(drop_last=True, batch_size=1000)


@case
def _use_delta(lab: Lab) -> None:
    assert all(".lora.lora_" in name for name in lab.run().weights())
    full = lab.run(use_delta=None).weights()
    assert "input_embedding.weight" in full and not any("lora" in name for name in full)


@case
def _init_delta(lab: Lab) -> None:
    first = lab.run(max_steps=5)
    second = lab.run(init_delta=first.save / "cpm_bee_finetune-delta-last.pt", lr=1e-9)
    assert "the delta begins as " in lab.printed
    assert distance(second.weights(), first.weights()) < 1e-6
    assert second.losses[0] != lab.run().losses[0]
    assert "no such delta file" in lab.refusal(init_delta=lab.folder / "none.pt")
    assert "--use-delta" in lab.refusal(init_delta=second.save, use_delta=None)


@case
def _delta_rank(lab: Lab) -> None:
    weights = lab.run(delta_rank=3).weights()
    assert all(tensor.shape[n.endswith("lora_B")] == 3 for n, tensor in weights.items())


@case
def _delta_alpha(lab: Lab) -> None:
    run = lab.run(delta_alpha=4, max_steps=1)
    usual = lab.run(max_steps=1)
    assert run.losses == usual.losses  # B is zero before the first step
    ratio = run.column("grad_norm")[0] / usual.column("grad_norm")[0]
    assert ratio == pytest.approx(4 / 16, rel=1e-4)
    note = json.loads((run.save / "cpm_bee_finetune-delta-best.json").read_text())
    assert note["alpha"] == 4


@case
def _delta_targets(lab: Lab) -> None:
    weights = lab.run(delta_targets="w_0,project_k").weights()
    assert {name.split(".lora.")[0].rpartition(".")[2] for name in weights} == {"w_0", "project_k"}
    assert "w_9" in lab.refusal(delta_targets="w_9,w_0")


@case
def _delta_dropout(lab: Lab) -> None:
    run, usual = lab.run(delta_dropout=0.5), lab.run()
    # At first B is zero; but blocks with dropout are computed otherwise.
    assert run.losses[0] == pytest.approx(usual.losses[0], rel=rounding.FLOOR)
    assert run.losses[1] != pytest.approx(usual.losses[1], rel=1e-3)
    assert "less than 1" in lab.refusal(delta_dropout=1)


@case
def _epoch(lab: Lab) -> None:
    run = lab.run(epoch=3, max_steps=None)
    per_epoch = [run.column("epoch").count(number) for number in range(4)]
    assert min(per_epoch[:3]) >= 8 and per_epoch[3] == 0
    assert run.reason == "all 3 epochs are done"


@case
def _max_steps(lab: Lab) -> None:
    run = lab.run(max_steps=3)
    assert run.column("step") == [1, 2, 3]
    assert "--max-steps" in run.reason


@case
def _batch_size(lab: Lab) -> None:
    tokens = lab.run(batch_size=1).column("tokens") + lab.run(batch_size=6).column("tokens")
    assert max(tokens[:2]) <= 64 and min(tokens[2:]) > 5 * 40


@case
def _accumulate(lab: Lab) -> None:
    tokens: list[int] = []
    original = CPMBee.loss

    def loss(model: CPMBee, batch: Batch) -> torch.Tensor:
        tokens.append(batch.num_tokens)
        return original(model, batch)

    lab.patch.setattr(CPMBee, "loss", loss)
    once, twice = lab.run(batch_size=8, max_steps=6), lab.run(accumulate=2, max_steps=6)
    # The point of it: no more than a part of the step is in memory at a time.
    count = len(once.losses)
    assert count < len(tokens) - count <= 2 * count
    assert max(tokens[:count]) > 4 * 64 >= max(tokens[count:])
    assert once.losses == pytest.approx(twice.losses, rel=1e-6)
    assert distance(once.weights(), twice.weights()) < 1e-6
    assert once.column("tokens") == twice.column("tokens")


@case
def _max_tokens(lab: Lab) -> None:
    tokens: list[int] = []
    records: list[int] = []
    original = CPMBee.loss

    def loss(model: CPMBee, batch: Batch) -> torch.Tensor:
        tokens.append(batch.num_tokens)
        records.append(len(batch.lengths))
        return original(model, batch)

    lab.patch.setattr(CPMBee, "loss", loss)
    whole, count = lab.run(max_steps=4), len(tokens)
    split = lab.run(max_steps=4, max_tokens=50)
    assert count == 4 and len(tokens) > 4 * count
    assert max(tokens[:count]) > 3 * 50 >= 3 * max(tokens[count:])
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert split.column("grad_norm") == pytest.approx(whole.column("grad_norm"), rel=1e-5)
    assert distance(whole.weights(), split.weights()) < 1e-5
    assert whole.column("tokens") == split.column("tokens")
    del tokens[:], records[:]
    alone = lab.run(max_steps=4, max_tokens=1)
    assert set(records) == {1}
    assert alone.losses == pytest.approx(whole.losses, rel=1e-6)


@case
def _lr(lab: Lab) -> None:
    run = lab.run(lr=0.125)
    assert run.column("lr") == [0.125, 0.125]
    assert distance(run.weights(), lab.run().weights()) > 0.05


@case
def _lr_decay_style(lab: Lab) -> None:
    for style in STYLES:
        run = lab.run(lr_decay_style=style, warmup_iters=2, train_iters=6, max_steps=5)
        expected = [learning_rate(style, 0.01, step, 2, 6) for step in range(5)]
        assert run.column("lr") == pytest.approx(expected)


@case
def _warmup_iters(lab: Lab) -> None:
    assert lab.run(warmup_iters=4).column("lr") == [0, 0.01 / 4]


@case
def _train_iters(lab: Lab) -> None:
    run = lab.run(lr_decay_style="linear", train_iters=2, max_steps=4)
    assert run.column("lr") == [0.01, 0.005, 0, 0]


@case
def _lr_decay_iters(lab: Lab) -> None:
    run = lab.run(lr_decay_style="linear", train_iters=2, lr_decay_iters=4, max_steps=4)
    assert run.column("lr") == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@case
def _start_step(lab: Lab) -> None:
    run = lab.run(warmup_iters=4, start_step=3)
    assert run.column("lr") == pytest.approx([0.0075, 0.01])
    assert run.column("step") == [1, 2]  # it moves the schedule alone


@case
def _weight_decay(lab: Lab) -> None:
    # In the first step A has no gradient (B is zero), so that it feels the decay alone.
    none, half = lab.run(weight_decay=0, max_steps=1), lab.run(weight_decay=0.5, max_steps=1)
    for name, before in none.weights().items():
        if name.endswith("lora_A"):
            assert torch.allclose(half.weights()[name], before * (1 - 0.01 * 0.5), rtol=1e-6)


@case
def _clip_grad(lab: Lab) -> None:
    # Adam's update lr*m/(sqrt(v)+eps) does not depend on the gradient's size, but for eps = 1e-8.
    clipped, usual = lab.run(clip_grad=1e-9, max_steps=1), lab.run(max_steps=1)
    assert clipped.column("grad_norm") == usual.column("grad_norm")  # that before clipping
    sizes = [
        max(t.abs().max().item() for n, t in run.weights().items() if n.endswith("lora_B"))
        for run in (clipped, usual)
    ]
    assert sizes[0] < 0.1 * sizes[1]


@case
def _loss_scale(lab: Lab) -> None:
    assert lab.run(loss_scale=64, dtype="fp16").column("loss_scale") == [64, 64]
    for dtype in ("fp32", "bf16"):
        assert lab.run(loss_scale=64, dtype=dtype).column("loss_scale") == [1, 1]


@case
def _loss_scale_factor(lab: Lab) -> None:
    run = lab.run(loss_scale=2.0**60, loss_scale_factor=8, dtype="fp16", max_steps=3)
    assert run.column("loss_scale") == [2.0**60, 2.0**57, 2.0**54]
    assert run.column("grad_norm") == [None] * 3  # infinite, which JSON cannot say
    assert lab.printed.count("overflow, step skipped") == 3
    assert all((t == 0).all() for n, t in run.weights().items() if n.endswith("lora_B"))


@case
def _loss_scale_steps(lab: Lab) -> None:
    run = lab.run(loss_scale=8, loss_scale_steps=2, dtype="fp16", max_steps=5)
    assert run.column("loss_scale") == [8, 8, 16, 16, 32]


@case
def _seed(lab: Lab) -> None:
    one, same, other = lab.run(seed=1), lab.run(seed=1), lab.run(seed=-2)
    assert one.losses == same.losses and one.column("tokens") != other.column("tokens")
    assert "2**48" in lab.refusal(seed=2**70)


@case
def _eval_interval(lab: Lab) -> None:
    run = lab.run(eval_dataset=lab.workspace.eval, eval_interval=2, max_steps=5)
    assert run.column("step", "eval") == [0, 2, 4, 5]


@case
def _early_stop_patience(lab: Lab) -> None:
    # A rate too small for fp32: the loss never falls.
    values = {"eval_dataset": lab.workspace.eval, "eval_interval": 1, "lr": 1e-30}
    run = lab.run(early_stop_patience=3, max_steps=None, **values)
    assert run.column("step", "eval") == [0, 1, 2, 3]
    assert run.reason == "early stop: 3 evaluations in a row without a lower loss"


@case
def _inspect_iters(lab: Lab) -> None:
    run = lab.run(inspect_iters=2, max_steps=3)
    assert lab.printed.count("trained tensors after") == 1
    table = lab.printed.partition("trained tensors after 2 steps:\n")[2].splitlines()
    assert table[0].split() == ["name", "shape", "mean", "std", "grad", "norm"]
    for line, name in zip(table[1:], run.weights(), strict=False):
        assert line.split()[0] == name
        assert all(math.isfinite(float(value)) for value in line.split()[-3:])


@case
def _save(lab: Lab) -> None:
    run = lab.run(save=lab.folder / "a" / "b")
    assert run.save == lab.folder / "a" / "b" and len(run.files) == 10
    path = lab.folder / "file"
    path.write_text("x")
    with pytest.raises(InputError, match="is a file"):
        lab.run(save=path)


@case
def _save_name(lab: Lab) -> None:
    assert all(name.startswith("mine-") for name in lab.run(save_name="mine").files)
    for name in ("a/b", ""):
        assert "--save-name" in lab.refusal(save_name=name)


@case
def _save_interval(lab: Lab) -> None:
    saved = []
    original = RunFiles.save_state

    def save_state(files: RunFiles, engine: Any, progress: dict[str, Any], *rest: Any) -> None:
        saved.append(progress["step"])
        original(files, engine, progress, *rest)

    lab.patch.setattr(RunFiles, "save_state", save_state)
    lab.run(save_interval=2, max_steps=5)
    assert saved == [0, 2, 4, 5]


@case
def _save_minutes(lab: Lab) -> None:
    assert states(lab.run(save_minutes=1e-9, save_total_limit=9, max_steps=3)) == [0, 1, 2, 3]
    assert states(lab.run(save_minutes=1e9, save_total_limit=9, max_steps=3)) == [0, 3]
    assert "--save-minutes" in lab.refusal(save_minutes=0)


@case
def _save_total_limit(lab: Lab) -> None:
    flags = {"save_interval": 2, "max_steps": 7}
    assert states(lab.run(**flags)) == [6, 7]
    assert states(lab.run(save_total_limit=1, **flags)) == [7]
    assert states(lab.run(save_total_limit=4, **flags)) == [2, 4, 6, 7]


def states(run: Run) -> list[int]:
    """The steps of a run's states; fails where a name does not tell the step."""
    found = []
    for path in run.save.glob("*-state*.pt"):
        found.append(torch.load(path, weights_only=True)["progress"]["step"])
        assert path.name in ("cpm_bee_finetune-state.pt", f"cpm_bee_finetune-state-{found[-1]}.pt")
    return sorted(found)


@case
def _keep_runs(lab: Lab) -> None:
    save = lab.folder / "kept"
    kept = [
        [name for name in lab.run(save=save, keep_runs=n, max_steps=1).files if "previous" in name]
        for n in (2, 2, 2, 1)
    ]
    names = ["cpm_bee_finetune-previous", "cpm_bee_finetune-previous-2"]
    assert kept == [[], names[:1], names, names[:1]]


@case
def _resume(lab: Lab) -> None:
    save = lab.new_folder()
    lab.run(save=save, max_steps=2)
    run = lab.run(save=save, max_steps=4, resume=True)
    assert "resumed after step 2" in lab.printed
    assert run.column("step") == [1, 2, 3, 4]
    assert "no saved state" in lab.refusal(resume=True)
    run = lab.run(save=save, max_steps=5, resume="auto")
    assert run.column("step") == [1, 2, 3, 4, 5]
    run = lab.run(save=save, max_steps=5, resume=save / "cpm_bee_finetune-state-4.pt")
    assert "resumed after step 4" in lab.printed and "cpm_bee_finetune-previous" in run.files
    assert lab.run(save=save, max_steps=1, resume="never").column("step") == [1]


@case
def _metric_for_best(lab: Lab) -> None:
    values = {"eval_dataset": lab.workspace.eval, "metric_for_best": "exact_match"}
    lab.patch.setattr(trainer, "evaluate", evaluations((2.0, 0.5), (1.0, 0.5), (0.5, 0.25)))
    run = lab.run(**values, eval_interval=1)
    state = load_tensors(run.save / "cpm_bee_finetune-state.pt", "a training state")
    assert (state["progress"]["best_loss"], state["progress"]["best_exact_match"]) == (1.0, 0.5)
    lab.patch.setattr(trainer, "evaluate", evaluations((2.0, 0.5), (1.0, 0.5), (0.5, 0.25)))
    run = lab.run(eval_dataset=lab.workspace.eval, eval_interval=1)
    state = load_tensors(run.save / "cpm_bee_finetune-state.pt", "a training state")
    assert state["progress"]["best_loss"] == 0.5
    refused = lab.refusal(metric_for_best="exact_match")
    assert "--metric-for-best exact_match: needs --eval-dataset" in refused


def evaluations(*figures: tuple[float, float]) -> Callable[..., Evaluation]:
    """Stands for `evaluate`; returns these losses and shares of exact matches, one by one."""
    rest = iter(figures)

    def evaluate(*_: Any) -> Evaluation:
        loss, exact_match = next(rest)
        return Evaluation(loss, 0.5, exact_match, 20)

    return evaluate


@case
def _report(lab: Lab) -> None:
    tables = lab.run(report="tables")
    assert "cpm_bee_finetune-report.html" in tables.files
    assert "cpm_bee_finetune-loss.png" not in tables.files
    assert not [name for name in lab.run(report="none").files if "report" in name]
    assert "cpm_bee_finetune-loss.png" in lab.run(report="curves").files


@case
def _log_interval(lab: Lab) -> None:
    run = lab.run(max_steps=7, log_interval=3)
    shown = [int(step) for step in re.findall(r"Iter: +(\d+)", lab.printed)]
    assert shown == [1, 3, 6]
    assert run.column("step") == list(range(1, 8))


@case
def _report_to(lab: Lab) -> None:
    run = lab.run(report_to="tensorboard", eval_dataset=lab.workspace.eval)
    [folder] = (run.save / "cpm_bee_finetune-tensorboard").iterdir()
    assert scalars(folder)["task/train/loss"] == pytest.approx(run.losses, rel=1e-6)
    assert "pip install -e '.[wandb]'" in lab.refusal(report_to="wandb")


@case
def _task_name(lab: Lab) -> None:
    run = lab.run(task_name="ccpm", tensorboard=lab.folder / "events")
    assert run.of("start")[0]["task"] == "ccpm"
    assert "ccpm/train/loss" in scalars(lab.folder / "events")


def scalars(folder: Path) -> dict[str, list[float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [s.value for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@case
def _tensorboard(lab: Lab) -> None:
    run = lab.run(tensorboard=lab.folder / "events", eval_dataset=lab.workspace.eval)
    written = scalars(lab.folder / "events")
    for name in ("loss", "lr", "grad_norm", "loss_scale", "tokens_per_second"):
        assert written[f"task/train/{name}"] == pytest.approx(run.column(name), rel=1e-6)
    for name in ("loss", "token_accuracy", "exact_match"):
        assert written[f"task/eval/{name}"] == pytest.approx(run.column(name, "eval"), rel=1e-6)
    real = importlib.util.find_spec
    lab.patch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "tensorboard" else real(n, *a)
    )
    assert "pip install -e '.[tensorboard]'" in lab.refusal(tensorboard=lab.folder / "none")


@case
def _engine(lab: Lab) -> None:
    assert lab.run(engine="torch").losses == lab.run(engine="auto").losses
    assert "--engine torch" in lab.refusal(engine="bmtrain")


@case
def _parallel(lab: Lab) -> None:
    # What each does among several processes is in test_distributed.py.
    runs = [lab.run(parallel=way) for way in ("auto", "ddp", "fsdp")]
    assert all(run.losses == runs[0].losses for run in runs)
    assert "one process, with the whole model" in lab.printed


@case
def _offload(lab: Lab) -> None:
    # With several processes: tests/engine/test_fsdp.py.
    assert "--parallel fsdp" in lab.refusal(offload=True)
    assert "several processes" in lab.refusal(offload=True, parallel="fsdp")


@case
def _device(lab: Lab) -> None:
    lab.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert lab.run(device="cpu").losses == lab.run(device="auto").losses
    assert "no usable GPU" in lab.refusal(device="cuda")
    assert "no such device" in lab.refusal(device="abacus")


@case
def _dtype(lab: Lab) -> None:
    runs = {d: lab.run(dtype=d, loss_scale=64) for d in ("auto", "fp32", "bf16", "fp16")}
    losses = {dtype: run.losses for dtype, run in runs.items()}
    assert losses["auto"] == losses["fp32"]  # on a CPU
    for dtype in ("bf16", "fp16"):
        assert losses[dtype] != losses["fp32"]
        assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.02)
        assert all(t.dtype == torch.float32 for t in runs[dtype].weights().values())


@case
def _checkpointing(lab: Lab) -> None:
    calls = []
    original = PaddedAttention.__call__

    def attend(self: PaddedAttention, *args: Any) -> torch.Tensor:
        calls.append(args)
        return original(self, *args)

    lab.patch.setattr(PaddedAttention, "__call__", attend)
    values = {"use_delta": None, "max_steps": 3}
    for dropout in (0.0, 0.2):  # blocks with a backward pass of their own, and plain ones
        calls.clear()
        none = lab.run(checkpointing="none", delta_dropout=dropout, **values)
        once = len(calls)
        full = lab.run(checkpointing="full", delta_dropout=dropout, **values)
        assert len(calls) - 2 * once == 3 * train_support.CONFIG.num_layers
        assert none.losses == full.losses
        assert distance(none.weights(), full.weights()) == 0
    assert "checkpointing full: as requested" in lab.printed
    lab.run(checkpointing="auto")
    assert "checkpointing none: a step needs less than" in lab.printed
    lab.patch.setattr(activation_checkpointing, "free_memory", lambda *_: 1 << 16)
    chosen: list[bool] = []
    lab.patch.setattr(BlockStack, "set_checkpointing", lambda self, wanted: chosen.append(wanted))
    lab.run(checkpointing="auto", **values)
    assert chosen[-1]
    assert "checkpointing full: a step needs about 0.00 GiB, without it" in lab.printed


@case
def _attention(lab: Lab) -> None:
    # More of flex is in tests/model/test_flex_attention.py and test_flex_probe.py.
    usual = lab.run(attention="sdpa")
    assert usual.losses == lab.run(attention="auto").losses
    assert "attention sdpa" not in lab.printed and "attention flex" not in lab.printed
    assert "no backward pass on a cpu" in lab.refusal(attention="flex")
    lab.patch.setattr(flex_attention, "unavailable_reason", lambda *_: None)
    assert lab.run(attention="flex").losses == usual.losses
    assert lab.printed.count("attention sdpa instead of flex: its kernels need dim_head 16") == 1
    lab.patch.setattr(flex_probe, "probe", lambda *_: None)
    used = []
    lab.patch.setattr(flex_attention, "_compiled", lambda f: used.append(f) or f)
    lab.patch.setattr(torch_flex, "_validate_device", lambda *_: None)
    run = lab.run(attention="flex")
    assert lab.printed.count("attention flex: agrees with sdpa") == 1
    assert run.losses == pytest.approx(usual.losses, rel=1e-5)
    assert torch_flex.flex_attention in used
    used.clear()
    lab.run(attention="flex", use_delta=None)
    assert lab.printed.count("attention sdpa instead of flex: the bias table is trained") == 1
    assert not used


@case
def _compile(lab: Lab) -> None:
    lab.patch.setattr(compiled, "BACKEND", "eager")  # see tests/model/test_compiled
    wanted = []
    original = torch.compile
    lab.patch.setattr(torch, "compile", lambda *a, **k: wanted.append(a) or original(*a, **k))
    run, usual = lab.run(compile=True), lab.run()
    assert len(wanted) == 1  # for all layers
    assert run.losses == pytest.approx(usual.losses, rel=1e-6)
    assert distance(run.weights(), usual.weights()) < 1e-6


@case
def _dry_run(lab: Lab) -> None:
    # What it finds and prints: test_dry_run.py.
    save = lab.new_folder()
    finetune(Options.parse(lab.workspace.flags(save, use_delta=True, dry_run=True)))
    assert not save.exists()


@pytest.mark.parametrize("action", flags(), ids=lambda action: action.dest)
def test_hyphens_and_underscores_are_the_same(action: argparse.Action) -> None:
    flag = action.option_strings[-1]
    required = [] if flag == "--dataset" else ["--dataset", "x"]
    value = (
        [] if action.nargs == 0 else ["3" if action.choices is None else list(action.choices)[1]]
    )
    special = {"--delta-targets": "w_0", "--report-to": "tensorboard"}
    special["--incontext-weights"] = "0.5,0.5"
    if flag in special:
        value = [special[flag]]
    spellings = (flag, "--" + flag[2:].replace("-", "_"))
    first, second = (parser().parse_args([*required, s, *value]) for s in spellings)
    assert first == second
    assert getattr(first, action.dest) not in (None, action.default)


WHOLE = [a for a in flags() if a.type in (positive, not_negative, whole_number)]


@pytest.mark.parametrize("action", WHOLE, ids=lambda action: action.dest)
@pytest.mark.parametrize("text", ["3", "3.", "3.0"])
def test_whole_numbers_may_have_a_point(action: argparse.Action, text: str) -> None:
    arguments = ["--dataset", "x", action.option_strings[0], text]
    value = getattr(parser().parse_args(arguments), action.dest)
    assert value == 3 and isinstance(value, int)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset"],
        ["--no-such-flag"],
        ["--use-delt"],
        ["--lr-decay-style", "square"],
        ["--dtype", "fp8"],
        ["--engine", "deepspeed"],
        *([a.option_strings[0], "1.5"] for a in WHOLE),
        *([a.option_strings[0], "nan"] for a in flags() if a.type and a.dest != "delta_targets"),
        *([f, "0"] for f in ("--lr", "--batch-size", "--clip-grad", "--epoch", "--max-length")),
        ["--loss-scale-factor", "1"],
        ["--weight-decay", "-0.1"],
        ["--warmup-iters", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_values_exit_with_2_and_one_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: int(bool(Options.parse(["--dataset", "x", *arguments]))))
    assert caught.value.code == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and arguments[0] in first
    assert rest == ["see: python finetune_cpm_bee.py --help"]
