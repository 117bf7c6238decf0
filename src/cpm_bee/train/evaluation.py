"""Evaluation over a whole data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cpm_bee.data.batch import Batch
from cpm_bee.engine import Engine
from cpm_bee.model.loss import Scores
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.samples import Sample, samples_of

NUM_SAMPLES = 8  # of the report


@dataclass(frozen=True)
class Evaluation:
    """Means over all targets (loss, token accuracy) and all records (exact match)."""

    loss: float
    token_accuracy: float
    exact_match: float  # share of records with every token of the answer correct
    records: int
    samples: list[Sample] = field(default_factory=list, compare=False)  # of rank 0


def sums_of(scores: Scores, batch: Batch, is_writable: torch.Tensor) -> list[float]:
    """Returns sums over a batch: loss, targets, correct tokens, correct records, records.

    Args:
        is_writable: whether generation can write the answer of each record, bool [R].
    """
    correct = scores.correct  # (N,)
    wrong = torch.zeros(len(batch.lengths), dtype=torch.int64, device=correct.device)
    wrong.index_add_(0, batch.target_records, (~correct).long())
    return [
        scores.losses.double().sum().item(),
        batch.num_targets,
        correct.sum().item(),
        ((wrong == 0) & is_writable.to(wrong.device)).sum().item(),
        len(batch.lengths),
    ]


@torch.no_grad()
def evaluate(model: CPMBee, engine: Engine, loader: DataLoader, num_samples: int = 0) -> Evaluation:
    """Evaluate in eval mode; collective, with the same exact figures on every rank.

    Exact match is the share of records whose answer generation with beam size 1 would write: at
    every target, the right token is the most probable of those that generation can write there.
    Rank 0 also returns the answers to its first `num_samples` records.
    """
    model.eval()
    sums = [0.0] * 5
    samples: list[Sample] = []
    bar = progress_bar(
        total=loader.num_records,
        description="evaluation",
        unit="records",
        quiet=engine.rank > 0,
    )
    with bar:
        for step, batches in loader.batches(0):
            for number, batch in enumerate(batches):
                if batch is None:
                    continue
                with engine.autocast():
                    scores = model.score(batch)
                if number < len(step.shares):  # the others are fillers
                    is_writable = torch.from_numpy(loader.is_writable(step.shares[number]))
                    own = sums_of(scores, batch, is_writable)
                    sums = [a + b for a, b in zip(sums, own, strict=True)]
                    if engine.rank == 0 and len(samples) < num_samples:
                        numbers = step.shares[number][: num_samples - len(samples)]
                        samples += samples_of(loader, numbers, batch, scores)
            bar.update(step.records)
    loss, targets, correct, exact, records = engine.reduce(sums)
    model.train()
    return Evaluation(loss / targets, correct / targets, exact / records, int(records), samples)
