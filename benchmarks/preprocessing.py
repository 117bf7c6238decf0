"""Measure preprocessing: MB/s, records/s, the speed-up with more processes, peak memory and slope.

    python benchmarks/preprocessing.py [--data BEE.jsonl] [--vocab VOCAB] [--sizes 0.25,1]

Makes input files of the given sizes (GB) from variations of the records of --data, or from entries
of the vocabulary; runs preprocess_dataset.py on each with each number of workers, and sums the
memory of its processes as the kernel reports it (PSS: shared pages count once). The pieces that a
process takes at a time grow with the input up to 0.27 GB; the slope is that of larger files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "src" / "preprocess_dataset.py"
INTERVAL = 0.1  # seconds between two measurements of memory
GB = 10**9


class Run(NamedTuple):
    size: int  # bytes of input
    records: int
    workers: int
    seconds: float
    peak: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tiny = ROOT / "src" / "ckpts" / "cpm-bee-tiny" / "vocab.txt"
    parser.add_argument("--data", type=Path, help="bee records, one per line")
    parser.add_argument("--vocab", type=Path, default=tiny, help="(default: the tiny model's)")
    parser.add_argument("--sizes", default="0.1", help="GB of input, comma-separated")
    parser.add_argument("--workers", default="1,2", help="numbers of processes, comma-separated")
    parser.add_argument("--scratch", type=Path, help="folder with room for 8 times the size")
    arguments = parser.parse_args()
    seeds = seed_lines(arguments.data, arguments.vocab)
    runs = []
    print("   GB    records  workers  seconds   MB/s  records/s  gain  peak MiB")
    for size in map(float, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            source = Path(folder) / "input.jsonl"
            records = generate(source, int(size * GB), seeds)
            for workers in map(int, arguments.workers.split(",")):
                run = measure(source, records, workers, arguments.vocab)
                runs.append(run)
                report(run, next(r for r in runs if r.size == run.size))
    slopes(runs)


def seed_lines(data: Path | None, vocab: Path) -> list[str]:
    """Lines of JSON whose "input" comes first."""
    if data is not None:
        records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        records = [{"input": "", **record} for record in records]
    else:
        entries = [e for e in vocab.read_text(encoding="utf-8").split("\n") if e and "<" not in e]
        rng = random.Random(0)

        def text(count: int) -> str:
            return "".join(rng.choices(entries, k=count))

        records = [
            {
                "input": text(15),
                "options": {f"<option_{i}>": text(5) for i in range(4)},
                "question": "?",
                "<ans>": f"<option_{rng.randrange(4)}>",
            }
            for _ in range(20_000)
        ]
    return [json.dumps(record, ensure_ascii=False) + "\n" for record in records]


def generate(path: Path, size: int, seeds: list[str]) -> int:
    """Write about `size` bytes of distinct records; returns their number."""
    with open(path, "wb") as file:
        for number, line in enumerate(varied(seeds)):
            if file.tell() >= size:
                return number
            file.write(line.encode())
    raise AssertionError("the lines never end")


def varied(seeds: list[str]) -> Iterator[str]:
    for round_ in itertools.count():
        for line in seeds:
            yield line.replace('"input": "', f'"input": "{round_}', 1)


def measure(source: Path, records: int, workers: int, vocab: Path) -> Run:
    output = source.parent / "bin_data"
    command = [sys.executable, SCRIPT, "--input", source, "--output-path", output]
    command += ["--output-name", "data", "--vocab", vocab, "--workers", workers]
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss, family(process.pid))))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"error: preprocess_dataset.py ended with status {process.returncode}")
    shutil.rmtree(output)
    return Run(source.stat().st_size, records, workers, seconds, peak)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # it has just ended
    return found


def pss(pid: int) -> int:
    """The memory of a process in bytes; shared pages count in proportion."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def report(run: Run, first: Run) -> None:
    print(
        f"{run.size / GB:5.2f} {run.records:10,} {run.workers:8} {run.seconds:8.1f} "
        f"{run.size / run.seconds / 1e6:6.1f} {run.records / run.seconds:10,.0f} "
        f"{first.seconds / run.seconds:5.2f} {run.peak / 2**20:9.0f}",
        flush=True,
    )


def slopes(runs: list[Run]) -> None:
    for workers in dict.fromkeys(run.workers for run in runs):
        own = [run for run in runs if run.workers == workers]
        least, most = own[0], own[-1]
        if most.size > least.size:
            slope = (most.peak - least.peak) / (most.size - least.size) * GB
            at_five = most.peak + slope * (5 - most.size / GB)
            print(
                f"{workers} workers: {slope / 2**20:+.0f} MiB for each GB of input, "
                f"{at_five / 2**20:.0f} MiB at 5 GB"
            )


if __name__ == "__main__":
    main()
