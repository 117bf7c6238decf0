"""Measure packing and batch making during training, on one core and without a model.

    python benchmarks/planning.py --dataset bin_data/train --vocab VOCAB

Prints, for rows of 2,048 tokens:
- tokens/s of a rank from the memory-mapped token index to its batches, and the fill of the rows;
- the start-up time on a generated index of 10 million records: opening it and making the plan;
- the cost on one rank of 1, 64 and 4,096, with that many records (the dataset's, repeated).

A simulated rank does not communicate: its sums are its own. Speeds use the CPU time of the process,
so that other processes disturb them less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from process_memory import peak_memory

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.data.token_index.writer import ARRAYS, INFO
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.data_loader import DataLoader

MAX_LENGTH = 2048
ENOUGH_TOKENS = 2_000_000


def simulated_rank(world_size: int) -> Any:
    """The part of an engine that a data loader needs."""
    return SimpleNamespace(
        rank=0, world_size=world_size, device=torch.device("cpu"), reduce=list, reduce_max=list
    )


class Repeated:
    """The records of an index, repeated up to `count` records."""

    def __init__(self, index: TokenIndex, count: int) -> None:
        self._index = index
        self.dataset = index.dataset
        self.lengths = np.resize(index.lengths, count)
        self.num_targets = np.resize(index.num_targets, count)
        self.extension_pairs = index.extension_pairs

    def __len__(self) -> int:
        return len(self.lengths)

    def stream(self, numbers: list[int], rng_of: Any) -> Any:
        return self._index.stream([n % len(self._index) for n in numbers], rng_of)

    def largest_subs(self, numbers: list[int]) -> list[int]:
        return self._index.largest_subs([n % len(self._index) for n in numbers])


def speed_and_fill(index: TokenIndex, tokenizer: Tokenizer, rows: int) -> tuple[float, float]:
    """Tokens/s of an epoch on one rank, the best of three, and the fill of its rows."""
    loader = DataLoader(
        index, tokenizer, simulated_rank(1), rows=rows, max_length=MAX_LENGTH, shuffle_seed=1
    )
    best = 0.0
    for epoch in range(3):
        tokens = filled = 0
        started = time.process_time()
        for step, _ in loader.batches(epoch):
            tokens += step.tokens
            filled += step.rows
        best = max(best, tokens / (time.process_time() - started))
    return best, tokens / (filled * MAX_LENGTH)


def write_generated(folder: Path, lengths: np.ndarray, dataset: Any, tokenizer: Tokenizer) -> None:
    """Write an index of records with these lengths; the rest is zeros, sparse on disk."""
    counts = {"tokens": int(lengths.sum(dtype=np.int64)), "records": len(lengths), "extensions": 0}
    for name, (dtype, counted) in ARRAYS.items():
        with open(folder / name, "wb") as file:
            file.truncate(counts[counted] * np.dtype(dtype).itemsize)
    lengths.astype(np.int32).tofile(folder / "lengths")
    info = {
        "dataset": dataset.fingerprint,
        "vocabulary": tokenizer.fingerprint,
        "trees": [[[0], [0]]],
        "extension_vocabulary": [],
        **counts,
    }
    (folder / INFO).write_text(json.dumps(info), encoding="utf-8")


def start_up(lengths: np.ndarray, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_generated(Path(folder), lengths, dataset, tokenizer)
        before = peak_memory()
        started = time.perf_counter()
        index = TokenIndex(Path(folder), dataset, tokenizer)
        opened = time.perf_counter()
        loader = DataLoader(
            index, tokenizer, simulated_rank(64), rows=512, max_length=MAX_LENGTH, shuffle_seed=1
        )
        planned = time.perf_counter()
        next(loader.batches(0))
        ready = time.perf_counter()
        print(
            f"start-up on {len(index):,} records: {ready - started:.2f} s (opening "
            f"{opened - started:.2f}, plan {planned - opened:.2f}, first step "
            f"{ready - planned:.2f}), peak memory {peak_memory() - before:.0f} MiB more"
        )


def cost_of_a_rank(index: Repeated, tokenizer: Tokenizer, world_size: int, rows: int) -> None:
    engine: Any = simulated_rank(world_size)
    loader = DataLoader(
        index,  # type: ignore[arg-type]
        tokenizer,
        engine,
        rows=rows * world_size,
        max_length=MAX_LENGTH,
        shuffle_seed=1,
    )
    tokens = steps = 0
    first = 0.0  # the first step also draws the order of the records, once per epoch
    started = time.process_time()
    for rank in range(world_size):  # an epoch has few steps, so several ranks are measured
        engine.rank = rank
        for step, _ in loader.batches(0):
            if not first:
                first = time.process_time() - started
                continue
            tokens += step.tokens
            steps += 1
            if tokens >= ENOUGH_TOKENS:
                break
        if tokens >= ENOUGH_TOKENS:
            break
    seconds = time.process_time() - started - first
    print(
        f"  1 of {world_size:5,} ranks, {rows} rows each: {tokens / seconds:12,.0f} tokens/s, "
        f"{seconds / steps * 1e6:6.0f} us a step; first step of an epoch {first * 1e3:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="folder of a binary dataset")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--records", type=int, default=10_000_000, help="of the generated index")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.vocab)
    index = TokenIndex.of(BinaryDataset(arguments.dataset), tokenizer)
    print(f"{len(index):,} records, {int(index.lengths.sum()):,} tokens")
    for rows in (8, 1):
        speed, fill = speed_and_fill(index, tokenizer, rows)
        print(f"  --batch-size {rows}: {speed:12,.0f} tokens/s, rows {fill:.2%} full")
    repeated = Repeated(index, arguments.records)
    start_up(repeated.lengths, index.dataset, tokenizer)
    print(f"one rank on {len(repeated):,} records:")
    for world_size in (1, 64, 4096):
        cost_of_a_rank(repeated, tokenizer, world_size, rows=8)


if __name__ == "__main__":
    main()
