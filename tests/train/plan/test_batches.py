"""Planned batches are those of the data loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train_support import Workspace

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.data_size import StepShape, survey
from cpm_bee.train.plan.batches import PlannedBatches


@pytest.mark.parametrize(("accumulate", "max_tokens"), [(1, None), (2, None), (2, 40)])
def test_they_are_those_of_the_loader(
    workspace: Workspace, accumulate: int, max_tokens: int | None
) -> None:
    tokenizer, dataset = Tokenizer.load(workspace.vocabulary), BinaryDataset(workspace.train)
    shape = StepShape(4 * accumulate, 64, shuffle_seed=7)
    found = survey(dataset, tokenizer, shape)
    planned = PlannedBatches.of(
        found,
        shape,
        len(tokenizer),
        processes=1,
        accumulate=accumulate,
        max_tokens=max_tokens,
    )
    loader = DataLoader(
        TokenIndex.of(dataset, tokenizer),
        tokenizer,
        TorchEngine(torch.device("cpu"), torch.float32),
        rows=shape.rows,
        max_length=shape.max_length,
        accumulate=accumulate,
        max_tokens=max_tokens,
        shuffle_seed=7,
    )
    steps = list(loader.batches(0))
    assert planned.steps == [step.shares for step, _ in steps]
    for micros, (_, batches) in zip(planned.steps, steps, strict=True):
        for micro, real in zip(micros, batches, strict=True):
            assert real is not None
            made = planned.batch(micro)
            assert (made.lengths, made.num_tokens) == (real.lengths, real.num_tokens)
            assert torch.equal(
                torch.bincount(made.target_records), torch.bincount(real.target_records)
            )
    assert planned.tokens_per_step() == np.mean([step.tokens for step, _ in steps])
    largest = max(planned.tokens(micro) for micro in planned.micros)
    assert largest in [batch.num_tokens for step in planned.heaviest() for batch in step]
    assert sorted(map(planned.tokens, planned.micros))[0] <= planned.typical().num_tokens <= largest
