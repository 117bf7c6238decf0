"""Measure the cost of OMP_WAIT_POLICY=PASSIVE when idle, and its gain beside a busy process.

    python benchmarks/busy_neighbour.py [--data BEE.jsonl --vocab bee.txt] [--rounds 2]

The threads of a step wait for each other many times. By default, a waiting thread of GNU OpenMP
spins: if another process needs a core, the thread that the others wait for is preempted while they
use up the remaining time by spinning. With PASSIVE, waiting threads sleep. Runs
benchmarks/train_step.py (LoRA, 256x4) with the default and with PASSIVE in turn (A B A B), alone
and beside a process that only counts, and prints tokens/s. Without --data it uses the sample of
this repository, whose vocabulary is small. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"default": None, "PASSIVE": "PASSIVE"}


def sample(folder: Path) -> list[str]:
    """Flags of train_step.py for the records and the vocabulary that come with the project."""
    script = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    paths = [str(script), "--input", str(ROOT / "raw_data"), "--output", str(folder)]
    subprocess.run([sys.executable, *paths], check=True, stdout=subprocess.DEVNULL)
    vocabulary = ROOT / "src" / "ckpts" / "cpm-bee-tiny" / "vocab.txt"
    return ["--data", str(folder / "train.jsonl"), "--vocab", str(vocabulary)]


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that keeps one core busy, if asked for."""
    if not busy:
        yield
        return
    # It ends with its parent, also where that is killed.
    count = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n"
    count += "    for _ in range(100_000): pass"
    process = subprocess.Popen([sys.executable, "-c", count])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tokens_per_second(flags: list[str], policy: str | None) -> float:
    """The median of the steps of one run of train_step.py."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *flags]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    found = re.search(r"median (\d+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="bee records, one per line")
    parser.add_argument("--vocab", help="their vocabulary")
    parser.add_argument("--steps", type=int, default=6, help="of one run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.vocab is None):
        parser.error("--data and --vocab go together")

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", arguments.data, "--vocab", arguments.vocab]
        flags = flags if arguments.data else sample(Path(folder))
        flags += ["--model", "256x4", "--steps", str(arguments.steps)]
        for busy in (False, True):
            speeds: dict[str, list[float]] = {name: [] for name in POLICIES}
            for _ in range(arguments.rounds):
                for name, policy in POLICIES.items():
                    with neighbour(busy):
                        speeds[name].append(tokens_per_second(flags, policy))
            print("beside a busy process:" if busy else "alone:", flush=True)
            for name, values in speeds.items():
                each = ", ".join(f"{value:,.0f}" for value in values)
                print(f"  {name}: {statistics.median(values):,.0f} tokens/s ({each})", flush=True)


if __name__ == "__main__":
    main()
