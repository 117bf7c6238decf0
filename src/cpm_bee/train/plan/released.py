"""The memory of the released sizes, predicted from config/ alone: the table of docs/memory.md.

    python -m cpm_bee.train.plan.released          writes scripts/templates/memory_table.json

`scripts/make_docs.py` makes the tables of both languages from that file, without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpm_bee.delta import DeltaConfig
from cpm_bee.files import atomic_file
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.memory_estimate import TrainingSetup, typical_batch
from cpm_bee.train.plan.memory import CARDS, fits
from cpm_bee.train.plan.simulation import Workload, simulate

ROOT = Path(__file__).resolve().parents[4]
TABLE = Path("scripts", "templates", "memory_table.json")
SIZES = ("1B", "2B", "5B", "10B")
LORA = TrainingSetup(torch.bfloat16, DeltaConfig())
WAYS = {
    "LoRA": LORA,
    "QLoRA (nf4)": replace(LORA, quantize="nf4"),
    "full": TrainingSetup(torch.bfloat16),
}
RECORDS, LENGTH, TARGETS = 23, 89, 3  # a row of 2,048 tokens: records of CCPM's mean length


def released_sizes(config: Path = ROOT / "config" / "cpm-bee-10b.json") -> dict[str, ModelConfig]:
    """docs/format.md §6. Which blocks the pruned releases lack is assumed; their number counts."""
    whole = ModelConfig.load(config)

    def kept(layer: int, number: int) -> bool:
        return layer * number // 48 != (layer + 1) * number // 48

    masks = tuple((not kept(i, 19), not kept(i, 24)) for i in range(48))
    pruned = replace(whole, mask_modules=masks)
    return {
        "10B": whole,
        "5B": pruned,
        "2B": replace(pruned, num_heads=16, dim_ff=5120),
        "1B": replace(pruned, num_heads=10, dim_ff=1024),
    }


def row(size: str, way: str) -> dict[str, Any]:
    """The figures of one size and way, in bytes; cards with what they need: "", "full", or None."""
    config, training = released_sizes()[size], WAYS[way]
    vocabulary = config.vocab_size
    batch = typical_batch([LENGTH] * RECORDS, TARGETS, vocabulary)
    work = Workload([[batch]])  # on a GPU an evaluation takes less than a step
    usual, less = (
        simulate(config, replace(training, checkpointing=full), work, on_gpu=True)
        for full in (False, True)
    )

    def of_card(card: int) -> str | None:
        if fits(usual.peak, card):
            return "none"
        return "full" if fits(less.peak, card) else None

    return {
        "size": size,
        "way": way,
        "weights": usual.weights,
        "peak": usual.peak,
        "peak_full": less.peak,
        "cards": {str(card): of_card(card) for card in CARDS},
    }


def rows() -> Iterator[dict[str, Any]]:
    for size in SIZES:
        for way in WAYS:
            yield row(size, way)


def main() -> None:
    table = {"tokens": RECORDS * LENGTH, "records": RECORDS, "rows": list(rows())}
    with atomic_file(ROOT / TABLE) as file:
        json.dump(table, file, indent=1)
        file.write("\n")
    print(f"written: {TABLE}; next: python scripts/make_docs.py", file=sys.stderr)


if __name__ == "__main__":
    main()
