"""Compare the losses of LoRA on a quantized base with those on the same base in fp32.

    python benchmarks/qlora_quality.py --data BEE.jsonl --vocab bee.txt [--model 512x8]

Both start from the same random weights (model/initialization.py) and see the same batches. Prints
the largest relative difference of a step's loss, and of the mean over --window steps; the exit
status is 1 if that of a step is above --limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from train_step import SIZES, read_batches

from cpm_bee import delta
from cpm_bee.cli import run_command
from cpm_bee.data.batch import Batch
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.quantize import NONE
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import quantize_
from cpm_bee.tokenizer import Tokenizer


def loss_curve(config: ModelConfig, batches: list[Batch], kind: str, lr: float) -> list[float]:
    """The loss of each step of a LoRA training run with one batch per step."""
    model = CPMBee(config)
    model.load_state_dict(dict(initial_values(model, seed=0)))
    if kind != NONE:
        quantize_(model, FORMATS[kind])
    delta.insert(model, delta.DeltaConfig(), seed=0)
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    losses = []
    for batch in progress_bar(batches, description=kind, unit="steps"):
        loss = model.loss(batch) / batch.num_targets
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(lr)
    return losses


def deviation(losses: list[float], reference: list[float], window: int = 1) -> float:
    """The largest relative difference of the means over each `window` steps."""
    means = [
        torch.tensor(curve, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)
        for curve in (losses, reference)
    ]
    return float(((means[0] - means[1]) / means[1]).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="bee records, one per line")
    add("--vocab", type=Path, required=True, help="vocabulary file")
    add("--model", choices=SIZES, default="512x8")
    add("--quantize", choices=tuple(FORMATS), default="nf4")
    add("--steps", type=int, default=200)
    add("--max-length", type=int, default=512, help="tokens of a step")
    add("--lr", type=float, default=3e-4)
    add("--window", type=int, default=20)
    add("--limit", type=float, default=0.02)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.vocab)
    config = ModelConfig(vocab_size=len(tokenizer), **SIZES[arguments.model])
    batches = read_batches(arguments.data, tokenizer, arguments.steps, arguments.max_length)
    reference, losses = (
        loss_curve(config, batches, kind, arguments.lr) for kind in (NONE, arguments.quantize)
    )
    print(f"step   fp32     {arguments.quantize}")
    for step in sorted({*range(0, len(losses), 20), len(losses) - 1}):
        print(f"{step + 1:4}   {reference[step]:7.4f}  {losses[step]:7.4f}")
    largest = deviation(losses, reference)
    means = deviation(losses, reference, min(arguments.window, len(losses)))
    print(f"largest difference: {largest:.2%} of a step, {means:.2%} of {arguments.window} steps")
    return 0 if largest <= arguments.limit else 1


if __name__ == "__main__":
    run_command(main)
