"""Compare what plan.py predicts with runs: peak memory, and the time of a step and of the whole.

    python benchmarks/planned_runs.py --work FOLDER --data TRAIN.jsonl --vocab bee.txt [--only NAME]

Writes a checkpoint of random weights and datasets to FOLDER once. For each setting it plans, then
runs finetune_cpm_bee.py, and reads the peak resident memory (VmHWM) of that process, or of rank 0,
from the kernel just before it ends. Fails where a prediction of memory is more than --tolerance
from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
MODEL = {"dim_model": 512, "num_heads": 8, "dim_head": 64, "dim_ff": 1280, "num_layers": 8}
CONFIG = {"vocab_size": 86_583, **MODEL, "half": True}
EVALUATION = 60  # records; the first ones
SMALL = ["--max-length", "512", "--batch-size", "4"]
LONG = ["--max-length", "2048", "--batch-size", "4", "--max-tokens", "2048"]
SHARDED = ["--parallel", "fsdp", *SMALL]  # by two processes
SETTINGS = {
    "LoRA": ["--use-delta", *SMALL],
    "LoRA, nf4": ["--use-delta", "--quantize", "nf4", *SMALL],
    "in full": SMALL,
    "longer rows, --max-tokens": ["--use-delta", *LONG],
    "evaluation dominates": ["--use-delta", "--max-length", "512", "--batch-size", "16",
                             "--max-tokens", "256", "--checkpointing", "full"],
    "LoRA, two processes, FSDP": ["--use-delta", *SHARDED],
    "in full, two processes, FSDP": SHARDED,
}  # fmt: skip
# Runs the script in a process that writes its own peak, and its CPU time, when it ends.
RUN = """
import atexit, json, os, runpy, sys, time
def write():
    if os.environ.get("RANK", "0") != "0":
        return
    status = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    json.dump({"peak": 1024 * int(status), "cpu": time.process_time()}, open(sys.argv_own, "w"))
sys.argv_own = sys.argv[1]
atexit.register(write)
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def prepare(work: Path, data: Path, vocabulary: Path) -> None:
    """Make what all settings use, if it is not there yet."""
    model = work / "model"
    if not (model / "pytorch_model.bin").is_file():
        work.mkdir(parents=True, exist_ok=True)
        (work / "config.json").write_text(json.dumps(CONFIG))
        script = ROOT / "benchmarks" / "random_checkpoint.py"
        command = [script, "--config", work / "config.json", "--output", model]
        subprocess.run([sys.executable, *map(str, command)], check=True)
        (model / "vocab.txt").write_bytes(vocabulary.read_bytes())
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"train": lines[EVALUATION:], "eval": lines[:EVALUATION]}
    for name, part in parts.items():
        if (work / "bin" / name).is_dir():
            continue
        records = work / "records" / f"{name}.jsonl"
        records.parent.mkdir(exist_ok=True)
        records.write_text("".join(part), encoding="utf-8")
    if not (work / "bin").is_dir():
        flags = ["--input", work / "records", "--output_path", work / "bin"]
        flags += ["--output_name", "data", "--vocab", vocabulary, "--workers", 1]
        script = ROOT / "src" / "preprocess_dataset.py"
        subprocess.run([sys.executable, str(script), *map(str, flags)], check=True)


def flags_of(work: Path, name: str, steps: int) -> list[str]:
    results = work / f"results-{list(SETTINGS).index(name)}"
    return [
        *("--dataset", str(work / "bin" / "train"), "--eval-dataset", str(work / "bin" / "eval")),
        *("--load", str(work / "model"), "--save", str(results), "--max-steps", str(steps)),
        *("--device", "cpu", "--warmup-iters", "0", "--log-interval", "1", *SETTINGS[name]),
    ]


def compare(work: Path, name: str, steps: int) -> dict[str, float]:
    """Plan and run a setting; returns the predicted and the measured figures."""
    flags = flags_of(work, name, steps)
    plan_file, peak_file = work / "plan.json", work / "peak.json"
    script = str(ROOT / "src" / "plan.py")
    processes = 2 if "fsdp" in flags else 1
    subprocess.run(
        [sys.executable, script, *flags, "--json", str(plan_file), "--processes", str(processes)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    plan: dict[str, Any] = json.loads(plan_file.read_text())
    runner = work / "run.py"
    runner.write_text(RUN)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = str(ROOT / "src" / "finetune_cpm_bee.py")
    begin = time.perf_counter()
    subprocess.run(
        [*launcher, str(runner), str(peak_file), script, *flags],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begin
    measured = json.loads(peak_file.read_text())
    results = Path(flags[flags.index("--save") + 1])
    log = (results / "cpm_bee_finetune-log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    of_steps = [r["tokens"] / r["tokens_per_second"] for r in rows if r["event"] == "train"]
    return {
        "predicted": plan["host_peak"] / MIB,
        "measured": measured["peak"] / MIB,
        "step": plan["time"]["step"],
        "step_measured": sorted(of_steps)[len(of_steps) // 2],
        "total": plan["time"]["total"],
        "total_measured": seconds,
        "cpu": steps * plan["time"]["step_cpu"]
        + 2 * plan["time"]["pass_cpu"]
        + plan["measured"]["start_cpu"],
        "cpu_measured": measured["cpu"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True, help="bee records, one per line")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    parser.add_argument("--steps", type=int, default=3, help="of each run")
    parser.add_argument("--tolerance", type=float, default=0.10)
    arguments = parser.parse_args()
    prepare(arguments.work, arguments.data, arguments.vocab)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(
        "| Setting | Peak, predicted | measured | ratio | Step, predicted | measured | "
        "Whole run, predicted | measured | CPU time, predicted | measured |"
    )
    print("|" + " --- |" * 10)
    good = True
    for name in [arguments.only] if arguments.only else SETTINGS:
        found = compare(arguments.work, name, arguments.steps)
        ratio = found["predicted"] / found["measured"]
        good = good and abs(ratio - 1) <= arguments.tolerance
        cells = [f"{found['predicted']:,.0f} MiB", f"{found['measured']:,.0f} MiB", f"{ratio:.3f}"]
        for kind in ("step", "total", "cpu"):
            cells += [f"{found[kind]:.1f} s", f"{found[f'{kind}_measured']:.1f} s"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
