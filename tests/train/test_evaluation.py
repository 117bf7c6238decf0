from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import train_support
from train_support import Workspace

from cpm_bee.data.batch import collate
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import load_pretrained
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.data_loader import DataLoader, PlannedStep
from cpm_bee.train.evaluation import Evaluation, evaluate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A model with dropout, trained until some of its answers are right and some are not."""
    with train_support.one_thread():
        workspace = train_support.make_workspace(tmp_path_factory.mktemp("learned"), dropout=0.1)
        save = tmp_path_factory.mktemp("learned-run")
        train_support.train(workspace, save, epoch=12, batch_size=2)
    return workspace, save / "cpm_bee_finetune-last.pt"


@pytest.fixture
def model(learned: tuple[Workspace, Path]) -> CPMBee:
    _, path = learned
    return load_pretrained(str(path), "auto", None, torch.float32, CPU).model


@pytest.fixture
def index(learned: tuple[Workspace, Path]) -> TokenIndex:
    workspace, _ = learned
    return TokenIndex.of(BinaryDataset(workspace.eval), tokenizer_of(workspace))


def tokenizer_of(workspace: Workspace) -> Tokenizer:
    return Tokenizer.load(workspace.vocabulary)


def feed_of(
    index: TokenIndex, workspace: Workspace, rows: int, max_length: int = 64
) -> tuple[DataLoader, TorchEngine]:
    engine = TorchEngine(CPU, torch.float32)
    loader = DataLoader(index, tokenizer_of(workspace), engine, rows=rows, max_length=max_length)
    return loader, engine


def numbers_of(step: PlannedStep) -> list[int]:
    return [number for share in step.shares for number in share]


def by_hand(
    model: CPMBee, index: TokenIndex, tokenizer: Tokenizer, loader: DataLoader
) -> Evaluation:
    """One record at a time, with the extension table of its step; figures in plain Python."""
    model.eval()
    loss, correct, targets, exact, records = 0.0, 0, 0, 0, 0
    for step, _ in loader.batches(0):
        for number in numbers_of(step):
            batch = collate([index.record(number)], tokenizer, step.extension)
            with torch.no_grad():
                rows = model(batch).double().tolist()
            hits = 0
            for row, target in zip(rows, batch.targets.tolist(), strict=True):
                loss += math.log(sum(math.exp(x) for x in row)) - row[target]
                hits += row[target] == max(row)
            targets += len(rows)
            correct += hits
            exact += hits == len(rows)
            records += 1
    model.train()
    return Evaluation(loss / targets, correct / targets, exact / records, records)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_figures_are_those_computed_by_hand(
    learned: tuple[Workspace, Path], model: CPMBee, index: TokenIndex, rows: int
) -> None:
    workspace, _ = learned
    loader, engine = feed_of(index, workspace, rows)
    result = evaluate(model, engine, loader)
    expected = by_hand(model, index, tokenizer_of(workspace), loader)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.token_accuracy == expected.token_accuracy
    assert result.exact_match == expected.exact_match
    assert result.records == expected.records == train_support.EVALUATION
    # Or the test would show little: some records are correct, some are not, some tokens of the
    # wrong ones are right.
    assert 0 < result.exact_match < result.token_accuracy < 1


def test_a_ragged_last_step_counts_as_all_others(
    learned: tuple[Workspace, Path], model: CPMBee, index: TokenIndex
) -> None:
    workspace, _ = learned
    loader, engine = feed_of(index, workspace, 3)
    steps = [step for step, _ in loader.batches(0)]
    assert len(steps) > 1 and steps[-1].rows < 3
    assert sorted(n for step in steps for n in numbers_of(step)) == list(range(len(index)))
    assert evaluate(model, engine, loader).records == len(index)


def test_dropout_is_off_during_evaluation_and_on_again_after_it(
    learned: tuple[Workspace, Path], model: CPMBee, index: TokenIndex
) -> None:
    workspace, _ = learned
    assert model.config.dropout_p == 0.1
    loader, engine = feed_of(index, workspace, 4)
    model.train()
    torch.manual_seed(1)
    first = evaluate(model, engine, loader)
    torch.manual_seed(2)
    assert evaluate(model, engine, loader) == first
    assert all(module.training for module in model.modules())
    _, (batch,) = next(loader.batches(0))
    assert batch is not None
    assert not torch.equal(model(batch), model(batch))


def test_records_that_are_too_long_are_not_among_the_figures(
    learned: tuple[Workspace, Path], model: CPMBee, index: TokenIndex
) -> None:
    workspace, _ = learned
    limit = int(sorted(index.lengths)[len(index) // 2])
    short = int((index.lengths <= limit).sum())
    loader, engine = feed_of(index, workspace, 3, limit)
    assert 0 < short < len(index)
    assert evaluate(model, engine, loader).records == short
    assert loader.size.num_too_long == len(index) - short
