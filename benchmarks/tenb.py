"""Train and run a model of 9.6 billion parameters on a machine with 24 GB and no GPU.

    python benchmarks/tenb.py --work FOLDER --vocab bee.txt [--data BEE.jsonl]

There are four phases, each in a separate process:
  checkpoint   writes random weights in the native fp16 format (19 GB)
  quantize     quantizes them to 4 bit, beside the checkpoint (5 GB)
  train        trains LoRA on one fixed batch of real records; the loss must fall at each step
  generate     generates one answer with the trained delta
An interrupted run continues with the first unfinished phase; results are in FOLDER/results.json. At
the end the weights are removed, unless --keep. Prints time and peak resident memory of each phase;
the exit status is 1 if the loss did not fall or a phase needed more than --limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from process_memory import peak_memory

from cpm_bee.cli import run_command
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("checkpoint", "quantize", "train", "generate")
# The options that the results depend on; a work folder has the results of one setting.
SETTINGS = ("config", "vocab", "data", "tokens", "steps", "lr", "quantize", "answer_tokens")
RAW_SAMPLE = ROOT / "raw_data" / "eval.jsonl"


class Work:
    """The folder of a run: weights, vocabulary, records, delta and results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint" / "pytorch_model.bin"
        self.vocab = folder / "vocab.txt"
        self.records = folder / "records.jsonl"
        self.delta = folder / "delta.pt"
        self.results = folder / "results.json"

    def read(self) -> dict[str, Any]:
        if not self.results.is_file():
            return {}
        return json.loads(self.results.read_text(encoding="utf-8"))

    def write(self, results: dict[str, Any]) -> None:
        with atomic_file(self.results) as file:
            file.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------ inputs


def prepare(work: Work, vocab: Path | None, data: Path | None, size: int) -> None:
    """Put vocabulary and records into the work folder."""
    from cpm_bee.tokenizer import Tokenizer

    source = vocab or ROOT / "src" / "ckpts" / "cpm-bee-tiny" / "vocab.txt"
    tokens = list(Tokenizer.load(source).tokens)
    if len(tokens) > size:
        raise InputError(f"{source}: has {len(tokens)} tokens, the model {size}")
    # Without the model's vocabulary: filled up with unused entries to the size of its embedding.
    tokens += [f"\ue000{i}" for i in range(size - len(tokens))]
    with atomic_file(work.vocab) as file:
        file.write("\n".join(tokens))
    if data is None:
        sys.path.insert(0, str(ROOT / "tutorials" / "basic_task_finetune"))
        from data_reformat import reformat

        with open(RAW_SAMPLE, encoding="utf-8") as raw:
            lines = [json.dumps(reformat(json.loads(line)), ensure_ascii=False) for line in raw]
    else:
        lines = data.read_text(encoding="utf-8").splitlines()
    with atomic_file(work.records) as file:
        file.write("\n".join(lines[:1000]) + "\n")


# ------------------------------------------------------------------ phases


def checkpoint_phase(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    from random_checkpoint import write_checkpoint

    path = write_checkpoint(arguments.config, work.checkpoint.parent)
    return {"gigabytes": path.stat().st_size / 1e9}


def load(work: Work, arguments: argparse.Namespace) -> Any:
    import torch

    from cpm_bee.pretrained import load_pretrained

    return load_pretrained(
        str(work.checkpoint),
        "auto",
        str(work.vocab),
        torch.float32,
        torch.device("cpu"),
        quantize=arguments.quantize,
    )


def quantize_phase(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    from cpm_bee.quantize.cache import cache_path
    from cpm_bee.quantize.formats import FORMATS
    from cpm_bee.quantize.linear import num_weights

    base = load(work, arguments)
    path = cache_path(work.checkpoint, FORMATS[arguments.quantize])
    return {"parameters": num_weights(base.model), "gigabytes": path.stat().st_size / 1e9}


def fixed_batch(work: Work, tokenizer: Any, num_tokens: int) -> Any:
    """The first records with about that many tokens in total."""
    from cpm_bee.data.batch import collate
    from cpm_bee.encoding import Encoder

    encoder = Encoder(tokenizer)
    records: list[Any] = []
    total = 0
    with open(work.records, encoding="utf-8") as file:
        for line in file:
            encoded = encoder.encode(json.loads(line))
            if records and total + len(encoded) > num_tokens:
                break
            records.append(encoded)
            total += len(encoded)
    return collate(records, tokenizer)


def train_phase(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cpm_bee import delta
    from cpm_bee.engine import OptimizerSettings
    from cpm_bee.engine.torch_engine import TorchEngine

    started = time.perf_counter()
    base = load(work, arguments)
    loading = time.perf_counter() - started
    config = delta.DeltaConfig()
    delta.insert(base.model, config, seed=0)
    base.model.encoder.set_checkpointing(True)
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    engine.prepare(base.model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    batch = fixed_batch(work, base.tokenizer, arguments.tokens)
    losses, seconds = [], []
    # One step more than updates, to see the effect of the last update.
    for step in range(arguments.steps + 1):
        started = time.perf_counter()
        loss = base.model.loss(batch) / batch.num_targets
        losses.append(loss.item())
        if step < arguments.steps:
            engine.backward(loss)
            engine.step(arguments.lr)
            seconds.append(time.perf_counter() - started)
        del loss
        print(f"after {step} steps: loss {losses[-1]:.4f}", flush=True)
    prints = (base.fingerprint, base.tokenizer.fingerprint)
    delta.save(work.delta, engine.trained_tensors(), config, *prints)
    return {
        "loading_seconds": loading,
        "tokens": batch.num_tokens,
        "targets": batch.num_targets,
        "losses": losses,
        "step_seconds": seconds,
        "tokens_per_second": batch.num_tokens * len(seconds) / sum(seconds),
    }


def generate_phase(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    from cpm_bee import delta
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.options import GenerationOptions

    base = load(work, arguments)
    delta.load(base.model, work.delta, base.fingerprint, base.tokenizer.fingerprint)
    options = GenerationOptions(beam_size=1, max_length=arguments.answer_tokens)
    with open(work.records, encoding="utf-8") as file:
        record = json.loads(file.readline())
    started = time.perf_counter()
    result = Generator(base.model, base.tokenizer).generate(record, options)
    return {"answer": result["<ans>"], "answer_seconds": time.perf_counter() - started}


RUN = {
    "checkpoint": checkpoint_phase,
    "quantize": quantize_phase,
    "train": train_phase,
    "generate": generate_phase,
}


def run_phase(work: Work, arguments: argparse.Namespace) -> None:
    """Run a phase in this process, which runs nothing else, and record its time and peak memory."""
    started = time.perf_counter()
    outcome = RUN[arguments.phase](work, arguments)
    outcome = {
        "seconds": time.perf_counter() - started,
        "peak_gigabytes": peak_memory() * 2**20 / 1e9,
        **outcome,
    }
    results = work.read()
    results["phases"][arguments.phase] = outcome
    work.write(results)


# ------------------------------------------------------------------ the whole


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="FOLDER", help="needs 25 GB of disk space")
    add("--config", type=Path, default=ROOT / "config" / "cpm-bee-10b.json")
    add("--vocab", type=Path, help="default: the tiny base's, filled up to the model's size")
    add("--data", type=Path, help="bee records, one per line; default: the sample's")
    add("--tokens", type=int, default=256, help="of the fixed batch")
    add("--steps", type=int, default=3)
    add("--lr", type=float, default=5e-4)
    add("--quantize", choices=("nf4", "int8"), default="nf4")
    add("--answer-tokens", type=int, default=4, help="approximate upper limit")
    add("--limit", type=float, default=9.0, help="GB of resident memory that a phase may need")
    add("--until", choices=PHASES, default=PHASES[-1], help="the last phase to run")
    add("--keep", action="store_true", help="leave the weights where they are")
    add("--phase", choices=PHASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def report(phases: dict[str, Any], limit: float) -> bool:
    """Print one line per phase; returns whether all targets are met."""
    fine = True
    for name, outcome in phases.items():
        fits = outcome["peak_gigabytes"] <= limit
        falls = all(b < a for a, b in pairwise(outcome.get("losses", [])))
        fine &= fits and falls
        details = {k: v for k, v in outcome.items() if k not in ("seconds", "peak_gigabytes")}
        print(f"{name:10} {outcome['seconds']:8.1f} s   peak {outcome['peak_gigabytes']:5.2f} GB"
              f"{'' if fits else f'  MORE THAN {limit:g} GB'}"
              f"{'' if falls else '  THE LOSS DID NOT FALL'}")  # fmt: skip
        print(f"{'':10} {json.dumps(details, ensure_ascii=False)}")
    return fine


def main() -> int:
    arguments = parse_arguments()
    work = Work(arguments.work)
    if arguments.phase:
        run_phase(work, arguments)
        return 0
    values = ((name, getattr(arguments, name)) for name in SETTINGS)
    settings = {n: str(v.resolve() if isinstance(v, Path) else v) for n, v in values}
    results = work.read() or {"settings": settings, "phases": {}}
    if results["settings"] != settings:
        raise InputError(f"{work.results}: of other settings; use another --work folder")
    if not results["phases"]:
        from cpm_bee.model.config import ModelConfig

        size = ModelConfig.load(arguments.config).vocab_size
        prepare(work, arguments.vocab, arguments.data, size)
        work.write(results)
    for phase in PHASES[: PHASES.index(arguments.until) + 1]:
        if phase not in results["phases"]:
            print(f"--- {phase}", flush=True)
            subprocess.run([sys.executable, *sys.argv, "--phase", phase], check=True)
            results = work.read()
    fine = report(results["phases"], arguments.limit)
    if not arguments.keep and len(results["phases"]) == len(PHASES):
        for path in (work.checkpoint.parent).glob("*"):
            os.remove(path)
    return 0 if fine else 1


if __name__ == "__main__":
    run_command(main)
