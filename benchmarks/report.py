"""Measure what the report of a run costs: the share of a step's time, with curves.

    OMP_NUM_THREADS=1 python benchmarks/report.py
    OMP_NUM_THREADS=1 python benchmarks/report.py --steps 400 --eval-interval 50 --rounds 3

Runs the small base model on the sample task without a report (A) and with one (B), in turn, and
prints the time of the calls of the report in B as a share of that of its steps, which a busy
machine hardly changes, and the processor time of the processes that draw the curves while the
training goes on as a share of the training's own: all that they can take from it where every core
is busy. Then it prints the median time of a step in A and in B; the difference is mostly noise.

Tried, no gain: drawing in the training's own process. Importing matplotlib took 2.2 s there, and
each of six curves about 0.1 s at every evaluation.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from cpm_bee.report.writer import ReportWriter
from cpm_bee.train.log import Reporter
from cpm_bee.train.options import Options
from cpm_bee.train.setup import finetune

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "src" / "ckpts" / "cpm-bee-tiny"
CALLS = ("add", "write", "write_new_curves")  # `write_end` comes after the last step


def make_data(folder: Path) -> Path:
    """Make the data sets of the sample task; returns the folder that has them."""
    tutorial = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    bee, data = folder / "bee", folder / "bin"
    commands = [
        [tutorial, "--input", ROOT / "raw_data", "--output", bee],
        [ROOT / "src" / "preprocess_dataset.py", "--input", bee, "--output_path", data,
         "--output_name", "sample", "--vocab", MODEL / "vocab.txt"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return data


def processor_seconds() -> tuple[float, float]:
    """Returns those of the processes that have ended, and of this one."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    children, own = (usage.ru_utime + usage.ru_stime for usage in usages)
    return children, own


class Meter:
    """Counts the seconds of all steps of a run, and of the calls of its report."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.report = 0.0
        self.drawing = self.training = 0.0  # processor time until the last step
        self._restores: list[Callable[[], None]] = []

    def __enter__(self) -> Meter:
        original = Reporter.train_step

        def train_step(own: Reporter, values: dict[str, Any], **rest: Any) -> None:
            self.steps.append(rest["seconds"])
            original(own, values, **rest)

        self._replace(Reporter, "train_step", train_step)
        for name in CALLS:
            self._replace(ReportWriter, name, self._timed(getattr(ReportWriter, name)))
        write_end = ReportWriter.write_end
        drawing, training = processor_seconds()

        def end(own: ReportWriter) -> None:
            after_drawing, after_training = processor_seconds()
            self.drawing, self.training = after_drawing - drawing, after_training - training
            write_end(own)

        self._replace(ReportWriter, "write_end", end)
        return self

    def _timed(self, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*values: Any) -> None:
            started = time.perf_counter()
            function(*values)
            self.report += time.perf_counter() - started

        return timed

    def _replace(self, owner: type, name: str, value: Any) -> None:
        original = getattr(owner, name)
        setattr(owner, name, value)
        self._restores.append(lambda: setattr(owner, name, original))

    def __exit__(self, *_: object) -> None:
        for restore in self._restores:
            restore()


def run(data: Path, save: Path, arguments: argparse.Namespace, report: str) -> Meter:
    flags = {
        "--load": MODEL, "--dataset": data / "train", "--eval-dataset": data / "eval",
        "--batch-size": 1, "--max-length": 1024, "--epoch": 100, "--lr": 0.01,
        "--max-steps": arguments.steps, "--eval-interval": arguments.eval_interval,
        "--save": save, "--report": report, "--device": "cpu",
    }  # fmt: skip
    values = [str(part) for pair in flags.items() for part in pair]
    with Meter() as meter:
        finetune(Options.parse(["--use-delta", *values]))
    return meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval-interval", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    medians: dict[str, list[float]] = {"none": [], "curves": []}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for number in range(arguments.rounds):
            for report, found in medians.items():
                meter = run(data, Path(folder, f"{report}-{number}"), arguments, report)
                found.append(statistics.median(meter.steps))
                if report == "curves":
                    share = meter.report / sum(meter.steps)
                    print(
                        f"report: {meter.report:.3f} s in {sum(meter.steps):.1f} s of "
                        f"{len(meter.steps)} steps: {share:.2%}; drawing: {meter.drawing:.2f} s of "
                        f"the processor, the training {meter.training:.1f} s: "
                        f"{meter.drawing / meter.training:.2%}",
                        flush=True,
                    )
    for report, found in medians.items():
        each = ", ".join(f"{seconds * 1000:.1f}" for seconds in found)
        print(f"--report {report}: median of a step {min(found) * 1000:.1f} ms ({each})")


if __name__ == "__main__":
    main()
