"""A small data set, vocabulary and base model for tests of training, and runs on them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import forked
import pytest
import rounding
import support
import torch

from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.checkpoint.sidecar import METADATA
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import REQUIRED
from cpm_bee.train.log import Reporter
from cpm_bee.train.options import Options
from cpm_bee.train.plan.measurement import Measured, StepTime
from cpm_bee.train.setup import finetune

LETTERS = "abcdefgh"
TOKENS = [*REQUIRED, "<mask>", "<option>", *LETTERS, *"0123456789春夏秋冬"]
CONFIG = ModelConfig(
    vocab_size=len(TOKENS), dim_model=16, num_heads=2, dim_head=8, dim_ff=32, num_layers=2
)
TRAINING, EVALUATION = 60, 20

# The flags that a test does not set itself: a step has about 16 records, an epoch 4 steps.
DEFAULTS = {
    "--max-length": 64,
    "--batch-size": 4,
    "--lr": 0.01,
    "--lr-decay-style": "constant",
    "--warmup-iters": 0,
    "--eval-interval": 1000,
    "--seed": 7,
    "--log-interval": 1,
    "--report": "tables",  # curves take seconds; tests/report has them
    "--device": "cpu",
}

TRAIN_FIELDS = [
    *("event", "step", "epoch", "loss", "lr", "grad_norm", "loss_scale", "tokens"),
    "tokens_per_second",
]
SAMPLES_FIELDS = ["event", "step", "host_memory", "gpu_memory", "samples"]
EVAL_FIELDS = ["event", "step", "loss", "token_accuracy", "exact_match", "records"]
DIGEST_FIELDS = ["event", "step", "sha256"]
END_FIELDS = ["event", "reason", "step", "finished"]


def records(count: int, seed: int) -> list[Record]:
    """Makes records of three kinds: copy a letter, two answers (shuffled), choose an option."""
    rng = random.Random(seed)
    result: list[Record] = []
    for number in range(count):
        word = "".join(rng.choices(LETTERS, k=rng.randrange(2, 9)))
        if number % 3 == 0:
            result.append({"input": word, "question": "春", "<ans>": word[0]})
        elif number % 3 == 1:
            answer: Record = {"夏": word[0], "秋": word[-1] + word[0]}
            result.append({"input": word, "<ans>": answer})
        else:
            options: Record = {f"<option_{i}>": c for i, c in enumerate(rng.sample(LETTERS, 3))}
            chosen = rng.choice(list(options))
            result.append({"input": options[chosen], "options": options, "<ans>": chosen})
    return result


@dataclass(frozen=True)
class Workspace:
    """`train` and `eval` are data sets; `model` a folder with checkpoint, config and vocabulary."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "bin_data" / "train"

    @property
    def eval(self) -> Path:
        return self.folder / "bin_data" / "eval"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def vocabulary(self) -> Path:
        return self.model / "vocab.txt"

    def flags(self, save: Path, **values: Any) -> list[str]:
        """Returns the flags of a run on this data: `DEFAULTS` and `values` (see `with_flags`)."""
        own = {"--dataset": self.train, "--load": self.model, "--save": save}
        return with_flags({**DEFAULTS, **own}, **values)


def with_flags(flags: dict[str, Any], **values: Any) -> list[str]:
    """Returns flags, changed by `values`: True is a switch, False or None leaves the flag out."""
    flags = flags | {"--" + name.replace("_", "-"): value for name, value in values.items()}
    result: list[str] = []
    for name, value in flags.items():
        if value is True:
            result.append(name)
        elif value is not None and value is not False:
            result += [name, str(value)]
    return result


def write_jsonl(path: Path, values: list[Record]) -> None:
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8")


def make_dataset(folder: Path, name: str, values: list[Record]) -> Path:
    """Write `folder/NAME.jsonl` and preprocess it; returns the data set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{name}.jsonl"
    write_jsonl(source, values)
    output = folder / "bin_data"
    preprocess(source, output, "data", seed=0, overwrite=False, block_size=1 << 20)
    return output / name


def make_model(folder: Path, config: ModelConfig = CONFIG, *, seed: int = 3) -> None:
    """Write a base model with random weights in the native format, with config and vocabulary."""
    folder.mkdir(parents=True)
    model = CPMBee(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0)
        if "layernorm" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    save_tensors(folder / "pytorch_model.bin", dict(model.state_dict()))
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")


def make_workspace(folder: Path, *, dropout: float = 0.0) -> Workspace:
    make_dataset(folder, "train", records(TRAINING, seed=1))
    make_dataset(folder, "eval", records(EVALUATION, seed=2))
    make_model(folder / "model", replace(CONFIG, dropout_p=dropout))
    return Workspace(folder)


@dataclass
class Run:
    """The files that a run named `name` left in its folder."""

    save: Path
    name: str = "cpm_bee_finetune"
    events: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        def refuse(constant: str) -> float:
            raise ValueError(f"{constant} is not JSON")

        text = (self.save / f"{self.name}-log.jsonl").read_text(encoding="utf-8")
        self.events = [json.loads(s, parse_constant=refuse) for s in text.splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def column(self, name: str, event: str = "train") -> list[Any]:
        return [e[name] for e in self.of(event)]

    @property
    def losses(self) -> list[float]:
        return self.column("loss")

    @property
    def reason(self) -> str:
        return str(self.events[-1]["reason"])

    def weights(self, which: str = "last") -> dict[str, torch.Tensor]:
        """Returns the saved weights of a delta run or, if there are none, of a full one."""
        delta = self.save / f"{self.name}-delta-{which}.pt"
        path = delta if delta.exists() else self.save / f"{self.name}-{which}.pt"
        tensors = load_tensors(path, "weights")
        tensors.pop(METADATA, None)
        return tensors

    @property
    def files(self) -> list[str]:
        return sorted(p.name for p in self.save.iterdir())


def train(workspace: Workspace, save: Path, **values: Any) -> Run:
    """Run a fine-tuning in this process."""
    options = Options.parse(workspace.flags(save, **values))
    finetune(options)
    return Run(Path(options.save), options.save_name)


def after_steps(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something when step number `step` of a run in this process is reported."""
    original = Reporter.train_step

    def train_step(self: Reporter, values: dict[str, Any], **rest: Any) -> None:
        original(self, values, **rest)
        if values["step"] == step:
            action()

    monkeypatch.setattr(Reporter, "train_step", train_step)


@dataclass
class Samples:
    """Runs of one process that show what rounding does to these steps (see `rounding`)."""

    exact: Run
    trusted: list[Run]

    @staticmethod
    def of(
        one: Run, workspace: Workspace, exactly: dict[str, Any] | None = None, **values: Any
    ) -> Samples:
        """Run more samples of a run with these flags, in folders beside it.

        One is in double precision, with flags changed by `exactly`. The others split their steps
        into smaller pieces, whose sums are the same but round differently.
        """

        def beside(name: str, **more: Any) -> Run:
            return train(workspace, one.save.with_name(f"{one.save.name}-{name}"), **values | more)

        with rounding.double_precision():
            exact = beside("double", **exactly or {})
        pieces = [beside(f"pieces-{size}", max_tokens=size) for size in (1, 60)]
        return Samples(exact, [one, *pieces])

    def check(self, other: Run, *, evaluations: bool = True) -> None:
        """Assert that a run's losses, gradient norms, evaluations and weights are as exact."""
        columns = [("loss", "train"), ("grad_norm", "train"), ("loss", "eval")]
        for name, event in columns[: 3 if evaluations else 2]:
            trusted = [run.column(name, event) for run in self.trusted]
            exact = self.exact.column(name, event)
            rounding.assert_as_exact(other.column(name, event), trusted, exact, f"{event} {name}")
        for which in ("best", "last"):
            actual, exactly, *others = (
                torch.cat([t.double().flatten() for _, t in sorted(run.weights(which).items())])
                for run in (other, self.exact, *self.trusted)
            )
            rounding.assert_as_exact(actual, others, exactly, f"{which} weights")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference between values of two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[n].float() - b[n].float()).abs().max().item() for n in a)


def environment(**values: str) -> dict[str, str]:
    """Returns an environment with one thread per process, without variables of torchrun."""
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **values}


SCRIPT = support.ROOT / "src" / "finetune_cpm_bee.py"


def command(*flags: str, ranks: int | None = None, script: Path = SCRIPT) -> list[str]:
    """Returns the command of a script, under torchrun if `ranks` is given."""
    launcher: list[str] = []
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [sys.executable, *launcher, str(script), *flags]


def start(command: list[str], cwd: Path, **values: str) -> subprocess.Popen[str]:
    return forked.Popen(
        command,
        cwd=cwd,
        env=environment(**values),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Wait for a process; returns its exit status, output and errors."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers then
        process.communicate(timeout=60)
        raise
    return process.returncode, output, errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, which is faster for tiny models and leaves the other cores free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Run several fine-tunings under one torchrun, since its processes take seconds to start."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it serves only one process group
    for port, flags in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(port)
        finetune(Options.parse(flags))


if __name__ == "__main__":
    main()


def pretend_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plans take fixed figures instead of those of a process that measures a step."""
    step = StepTime(tokens=100, train=0.5, evaluate=0.1, train_cpu=0.4, evaluate_cpu=0.1)
    found = Measured(200 << 20, 100 << 20, 2.0, 1.5, 1e9, 2e8, step)
    monkeypatch.setattr("cpm_bee.train.plan.run.measure", lambda *_: found)
