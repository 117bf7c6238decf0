"""Measure one LoRA training step on the CPU: tokens/s, share of the matmul roofline, peak memory.

    python benchmarks/train_step.py --data BEE.jsonl [--model 256x4] [--vocab bee.txt]

The roofline is the time for the necessary multiply-adds, at the speed that plain matmuls of the
same shapes reach in the same run. Necessary are the forward pass, the input gradient of every
Linear above the lowest delta, no weight gradients of frozen weights, logits at targets only, and in
the last layer queries, attention output and feed-forward at targets only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from process_memory import peak_memory

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.data.packing import pack
from cpm_bee.encoding import Encoder
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.buffers import return_freed_memory
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "256x4": {"dim_model": 256, "num_heads": 4, "dim_head": 64, "dim_ff": 640, "num_layers": 4},
    "512x8": {"dim_model": 512, "num_heads": 8, "dim_head": 64, "dim_ff": 1280, "num_layers": 8},
}


def read_batches(data: Path, tokenizer: Tokenizer, count: int, max_length: int) -> list[Batch]:
    """The first packed rows of a file of bee records, each as a batch."""
    encoder = Encoder(tokenizer)
    with open(data, encoding="utf-8") as file:
        records = [
            encoder.encode(json.loads(line))
            for line, _ in zip(file, range(60 * count), strict=False)
        ]
    rows = pack(range(len(records)), [len(r) for r in records], max_length)
    return [
        collate([records[i] for i in row], tokenizer)
        for row, _ in zip(rows, range(count), strict=False)
    ]


def matmul_seconds(rows: int, inner: int, columns: int) -> float:
    """The time of a plain [rows, inner] x [inner, columns] product, the best of several."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    out = torch.empty(rows, columns)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        torch.mm(a, b.T, out=out)
        times.append(time.perf_counter() - started)
    return min(times)


def roofline_seconds(config: ModelConfig, batch: Batch) -> float:
    """The minimum time of a LoRA step on q and v: that of its matmuls."""
    tokens, targets = batch.num_tokens, batch.num_targets
    d, inner, ff = config.dim_model, config.num_heads * config.dim_head, config.dim_ff

    def block(queries: int, lowest: bool) -> float:
        # (rows, dim_in, dim_out, how often: forward and, above the lowest delta, input gradient)
        below = 1 if lowest else 2
        shapes = [
            (queries, d, inner, below),  # q
            (tokens, d, inner, below),  # k
            (tokens, d, inner, below),  # v
            (queries, inner, d, 2),  # attention_out
            (queries, d, ff, 4),  # w_0 and w_1
            (queries, ff, d, 2),  # w_out
        ]
        return sum(times * matmul_seconds(r, i, o) for r, i, o, times in shapes)

    blocks = [block(tokens, lowest=True), block(targets, lowest=False)]
    blocks += [block(tokens, lowest=False)] * (config.num_layers - 2)
    return sum(blocks) + 2 * matmul_seconds(targets, d, config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="bee records, one per line")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--model", choices=SIZES, default="256x4")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    arguments = parser.parse_args()

    floor = peak_memory()
    tokenizer = Tokenizer.load(arguments.vocab)
    config = ModelConfig(vocab_size=len(tokenizer), **SIZES[arguments.model])
    model = CPMBee(config)
    model.load_state_dict(dict(initial_values(model, 0)))
    delta.insert(model, delta.DeltaConfig(), 0)
    return_freed_memory()
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    batches = read_batches(arguments.data, tokenizer, arguments.steps, arguments.max_length)

    def step(batch: Batch) -> None:
        engine.backward(model.loss(batch) / batch.num_targets)
        engine.step(1e-3)

    step(batches[0])
    speeds, shares = [], []
    for batch in batches[1:]:
        started = time.perf_counter()
        step(batch)
        seconds = time.perf_counter() - started
        speeds.append(batch.num_tokens / seconds)
    peak = peak_memory()  # before the roofline's own matrices
    for batch, speed in zip(batches[1:4], speeds, strict=False):
        shares.append(roofline_seconds(config, batch) * speed / batch.num_tokens)
    print(f"model {arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"tokens/s: median {statistics.median(speeds):.0f}, best {max(speeds):.0f}")
    print(f"share of the matmul roofline: {statistics.median(shares):.2f}")
    print(f"peak memory above the import floor of {floor:.0f} MiB: {peak - floor:.0f} MiB")
    if arguments.profile:
        with torch.profiler.profile() as profile:
            step(batches[1])
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
