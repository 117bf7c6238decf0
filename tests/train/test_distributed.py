"""Two and four processes under torchrun (gloo), replicated and sharded, do what one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
import train_support
from train_support import Run, Samples, Workspace, free_port, train

from cpm_bee.checkpoint.reader import save_tensors
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.packing import Plan
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.files import exclusive
from cpm_bee.pretrained import load_pretrained
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.tokenizer import Tokenizer

ROWS = 4  # of a step, over all processes
MAX_LENGTH = 48  # so that row streams end at different steps
STEPS = 20
# What the processes of a torchrun write in turn, and who goes on with it.
RELAY = [(1, "auto", 4), (2, "ddp", 8), (2, "fsdp", 12), (4, "fsdp", 15), (4, "ddp", 17)]

# Two processes, one, and two again, each until after this step; names of RUNS with the way of two.
RETURN = [(2, 7), (1, 13), (2, STEPS)]
RETURNED = {"delta": "ddp", "full": "fsdp"}

# name -> flags, the ways to distribute it that are tried, and micro-steps of a step
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "delta": ({"use_delta": True}, ("ddp", "fsdp"), 1),
    # Processes have different numbers of batches.
    "accumulate": ({"use_delta": True, "max_tokens": 40}, ("ddp", "fsdp"), 2),
    "full": ({"lr": 0.003}, ("ddp", "fsdp"), 1),
    "random": ({"lr": 0.003, "load": None}, ("fsdp",), 1),
    "quantized": ({"use_delta": True, "quantize": "int8", "checkpointing": "full"}, ("fsdp",), 1),
    # Fewer records than processes, to train on and to evaluate on.
    "few": ({"use_delta": True, "epoch": STEPS}, ("ddp", "fsdp"), 1),
}
# Tried on one number of processes, to save time.
ONCE = {"random": 4, "quantized": 2}
CASES = [
    (name, n, way)
    for name, (_, ways, _) in RUNS.items()
    for n in (2, 4)
    for way in ways
    if ONCE.get(name, n) == n
]


class Course:
    """The runs of this file, each in a folder of its own."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        # Of its own: a quantized base is kept beside it.
        model = shutil.copytree(workspace.model, folder / "model")
        self._few = [
            train_support.make_dataset(folder, name, train_support.records(1, seed))
            for name, seed in (("few", 5), ("one", 6))
        ]
        self._workspace = workspace
        self._model = model
        self._seed = seed_with_one_last_row(workspace)
        self.folder = folder
        self._samples: dict[str, Samples] = {}

    def flags(self, name: str, processes: int, way: str) -> dict[str, Any]:
        common, _, accumulate = RUNS[name]
        flags = {
            "load": self._model, "eval_dataset": self._workspace.eval, "eval_interval": 5,
            "seed": self._seed, "epoch": 9, "max_steps": STEPS, "max_length": MAX_LENGTH,
            "batch_size": ROWS // processes, "parallel": way, "checkpointing": "none",
        }  # fmt: skip
        if name == "random":
            flags |= {
                "model_config": self._model / "config.json",
                "vocab": self._workspace.vocabulary,
            }
        if name == "few":
            flags |= {"dataset": self._few[0], "eval_dataset": self._few[1]}
        if processes > 1:
            parts = min(accumulate, ROWS // processes)
            flags |= {"batch_size": ROWS // processes // parts, "accumulate": parts}
        return flags | common

    def alone(self, name: str, folder: str = "", **values: Any) -> Run:
        save = self.folder / (folder or f"{name}-1")
        return train(self._workspace, save, **self.flags(name, 1, "auto") | values)

    def samples(self, name: str) -> Samples:
        if name not in self._samples:
            one = Run(self.folder / f"{name}-1")
            flags = self.flags(name, 1, "auto")
            # Codes are made and read in fp32 alone: in double, the weights that they stand for.
            dense = {"load": self._dense_model(), "quantize": None} if name == "quantized" else None
            self._samples[name] = Samples.of(one, self._workspace, dense, **flags)
        return self._samples[name]

    def _dense_model(self) -> Path:
        cpu, kind = torch.device("cpu"), RUNS["quantized"][0]["quantize"]
        base = load_pretrained(str(self._model), "auto", None, torch.float32, cpu, quantize=kind)
        weights = {
            name: parameter.detach()
            for name, parameter in base.model.named_parameters()
            if not name.endswith((".codes", ".absmax"))
        }
        for name, module in base.model.named_modules():
            if isinstance(module, QuantizedLinear):
                weights[f"{name}.weight"] = module.dense(module.operands(), torch.float32)
        folder = shutil.copytree(self._workspace.model, self.folder / "dense")
        save_tensors(folder / "pytorch_model.bin", weights)
        return folder

    def together(self, processes: int) -> str:
        """All runs on several processes; returns what rank 0 printed."""
        commands = [
            self._workspace.flags(self.folder / f"{name}-{n}-{way}", **self.flags(name, n, way))
            for name, n, way in CASES
            if n == processes
        ]
        for n, way, last in RELAY:
            if n == processes:
                flags = self.flags("full", n, way) | {"max_steps": last, "resume": True}
                commands.append(self._workspace.flags(self.folder / "relay", **flags))
        if processes == RETURN[0][0]:
            commands += self._return_commands(RETURN[0][1])
        return self._run(processes, commands)

    def go_and_return(self) -> None:
        """After the first leg, which `together` has run."""
        for name in RETURNED:
            self.alone(name, f"return-{name}", resume=True, max_steps=RETURN[1][1])
        self._run(RETURN[2][0], self._return_commands(RETURN[2][1], resume=True))

    def _return_commands(self, last: int, **values: Any) -> list[list[str]]:
        commands = []
        for name, way in RETURNED.items():
            flags = self.flags(name, 2, way) | {"max_steps": last, **values}
            commands.append(self._workspace.flags(self.folder / f"return-{name}", **flags))
        return commands

    def _run(self, processes: int, commands: list[list[str]]) -> str:
        listed = self.folder / f"commands-{processes}.json"
        listed.write_text(json.dumps([[free_port(), c] for c in commands]))
        script = support.ROOT / "tests" / "train_support.py"
        command = train_support.command(str(listed), ranks=processes, script=script)
        values = {"PYTHONPATH": str(support.ROOT / "src"), "TMPDIR": str(self.folder)}
        process = train_support.start(command, self.folder, **values)
        status, output, errors = train_support.finish(process)
        assert status == 0, errors
        # By rank 0 alone.
        assert output.count(f"engine torch, {processes} process(es)") == len(commands)
        return output


def seed_with_one_last_row(workspace: Workspace) -> int:
    """A seed whose first epoch ends with a step in which only one process has a row."""
    index = TokenIndex.of(BinaryDataset(workspace.train), Tokenizer.load(workspace.vocabulary))
    for seed in range(100):
        plan = Plan(np.asarray(index.lengths), rows=ROWS, max_length=MAX_LENGTH, shuffle_seed=seed)
        last = list(plan.steps(0, range(ROWS)))[-1]
        if sum(map(bool, last)) == 1:
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def course(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Course:
    made = Course(workspace, tmp_path_factory.mktemp("distributed"))
    with train_support.one_thread():
        for name in RUNS:
            made.alone(name)
        made.alone("full", "relay", max_steps=RELAY[0][2])
        for processes in (2, 4):
            output = made.together(processes)
            for way in ("ddp", "fsdp"):
                count = [c[1:] for c in CASES].count((processes, way))
                count += [leg[:2] for leg in RELAY].count((processes, way))
                count += list(RETURNED.values()).count(way) if processes == 2 else 0
                assert output.count(f"parallel {way}, each process") == count
        made.alone("full", "relay", resume=True)
        made.go_and_return()
    return made


def compare(course: Course, name: str, other: Run, *, evaluations: bool) -> None:
    one = Run(course.folder / f"{name}-1")
    assert len(one.losses) == STEPS
    for column in ("step", "epoch", "lr", "tokens"):
        assert other.column(column) == one.column(column)
    assert other.reason == one.reason
    if evaluations:
        assert other.column("step", "eval") == one.column("step", "eval") == [0, 5, 10, 15, 20]
    course.samples(name).check(other, evaluations=evaluations)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes", "way"), CASES)
def test_many_processes_train_as_one_does(
    course: Course, name: str, processes: int, way: str
) -> None:
    one = Run(course.folder / f"{name}-1")
    assert one.column("epoch").count(1) > 0  # past the step in which processes have no row
    other = Run(course.folder / f"{name}-{processes}-{way}")
    assert other.of("start")[0]["world_size"] == processes
    # A step of evaluation is as large as a micro-step, and its records share an extension table.
    compare(course, name, other, evaluations=RUNS[name][2] == 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["full", "few"])
def test_evaluation_has_the_figures_of_one_process(
    course: Course, processes: int, way: str, name: str
) -> None:
    one, other = Run(course.folder / f"{name}-1"), Run(course.folder / f"{name}-{processes}-{way}")
    for first, second in zip(one.of("eval"), other.of("eval"), strict=True):
        for figure in ("step", "token_accuracy", "exact_match", "records"):
            assert second[figure] == first[figure]


@pytest.mark.slow
def test_any_number_of_processes_goes_on_where_others_were(course: Course) -> None:
    relay = Run(course.folder / "relay")
    sizes = [event["world_size"] for event in relay.of("start")]
    assert sizes == [leg[0] for leg in RELAY] + [1]
    assert relay.column("step") == list(range(1, STEPS + 1))
    compare(course, "full", relay, evaluations=False)  # each leg adds one at its end


@pytest.mark.slow
@pytest.mark.parametrize("name", RETURNED)
def test_two_processes_then_one_then_two_again(course: Course, name: str) -> None:
    """As two all the way, to the rounding of sums in another order."""
    whole = Run(course.folder / f"{name}-2-{RETURNED[name]}")
    returned = Run(course.folder / f"return-{name}")
    assert [event["world_size"] for event in returned.of("start")] == [n for n, _ in RETURN]
    assert returned.column("step") == list(range(1, STEPS + 1))
    assert returned.losses == pytest.approx(whole.losses, rel=1e-6)
    for tensor, expected in whole.weights().items():
        error = (returned.weights()[tensor] - expected).norm()
        assert error <= 1e-6 * expected.norm(), tensor


@pytest.mark.slow
def test_sharded_fine_tuning_starts_with_the_values_of_one_process(course: Course) -> None:
    one, other = (
        train_support.load_tensors(course.folder / folder / "cpm_bee_finetune-state.pt", "a state")
        for folder in ("random-1", f"random-{ONCE['random']}-fsdp")
    )
    assert one["base_fingerprint"] == other["base_fingerprint"]


def test_answers_are_shuffled_alike_on_any_number_of_processes(workspace: Workspace) -> None:
    # So that the comparisons above cover it: the data set has answers to shuffle.
    index = TokenIndex.of(BinaryDataset(workspace.train), Tokenizer.load(workspace.vocabulary))
    assert index._arrays["shuffled"].sum() == train_support.TRAINING // 3


@pytest.mark.slow
def test_one_lock_for_all_processes_of_a_run(workspace: Workspace, tmp_path: Path) -> None:
    """The first process holds it; while another run has it, all of them end."""
    save = tmp_path / "results"
    flags = workspace.flags(save, use_delta=True, max_steps=1)
    with exclusive(save / ".cpm_bee_finetune.lock", "holds it"):
        run = train_support.start(train_support.command(*flags, ranks=2), tmp_path)
        status, _, errors = train_support.finish(run)
        assert status != 0 and "error: process" in errors and "another --save-name" in errors
        assert [p.name for p in save.iterdir()] == [".cpm_bee_finetune.lock"]
    run = train_support.start(train_support.command(*flags, ranks=2), tmp_path)
    assert train_support.finish(run)[0] == 0
    assert "cpm_bee_finetune-state.pt" in Run(save).files
    assert not [name for name in Run(save).files if name.startswith(".")]
