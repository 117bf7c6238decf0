from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import train_support
from hypothesis import assume, event, given
from hypothesis import strategies as st
from properties import examples
from train_support import Workspace

from cpm_bee.data.batch import collate
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import load_pretrained
from cpm_bee.records import Record, has_answer, validate, without_marks
from cpm_bee.segments import outline
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


# ------------------------------------------------------------------ evaluation is generation

# One character an entry, so that a known text has one sequence of tokens.
LETTERS = Tokenizer([*tiny.RESERVED_TOKENS, "<", ">", "a", "b", "x", "春", "天"], "letters")
LONGEST = 12  # tokens that generation writes


class Written(NamedTuple):
    """What generation writes for a record.

    Attributes:
        is_canonical: the tokenizer would write the text in the same tokens. Otherwise, as for two
            unknown runs of the context in a row, the text is equal and evaluation, which looks at
            one sequence of tokens, calls it wrong.
    """

    record: Record
    is_canonical: bool


def write(model: CPMBee, record: Record) -> Written:
    generator, options = (
        Generator(model, LETTERS),
        GenerationOptions(beam_size=1, max_length=LONGEST),
    )
    [output] = generator.search([record], options)
    prompt, written = output.prompt, without_marks(output.filled())
    tokens = output.job.answers() if output.job else []
    if validate(written) or len(tokens) < len(prompt.answers):
        return Written(record, False)
    encoded = generator.encoder.encode_as_generated(written)
    pairs = list(zip(encoded.ids.tolist(), encoded.subs.tolist(), strict=True))
    segments = encoded.segments.tolist()
    own = [
        [pair for pair, segment in zip(pairs, segments, strict=True) if segment == answer][1:]
        for answer in prompt.answers
    ]
    return Written(written, own == tokens)


def fits(record: Record) -> bool:
    """Generation can write so many tokens."""
    segments = outline(record)
    leaves = [t for t, p in zip(segments.texts, segments.tree.predicted, strict=True) if p]
    return sum(len(LETTERS.encode(leaf)) + 1 for leaf in leaves) <= LONGEST


@pytest.mark.slow
@examples(40)
@given(st.lists(tiny.records(), min_size=1, max_size=6), st.integers(0, 3))
def test_exact_match_is_what_generation_writes(records: list[Record], seed: int) -> None:
    """On any records: unknown characters, options, answers before their context, empty answers."""
    model = tiny.make_model(seed, vocab_size=len(LETTERS))
    written = [(record, write(model, record)) for record in records]
    # Half of the answers are the model's own, so that some are right.
    own = [w.record for record, w in written[::2] if w.is_canonical]
    values = [r for r in own + [record for record, w in written if w.is_canonical] if fits(r)]
    answered = [r for r in values if has_answer(r["<ans>"])]
    assume(answered)
    expected = sum(write(model, r).record["<ans>"] == r["<ans>"] for r in answered)
    with tempfile.TemporaryDirectory() as folder:
        dataset = BinaryDataset(train_support.make_dataset(Path(folder), "set", values))
        index = TokenIndex.of(dataset, LETTERS)
        engine = TorchEngine(CPU, torch.float32)
        shape: dict[str, Any] = {"rows": 3, "max_length": 4096, "as_generated": True}
        result = evaluate(model, engine, DataLoader(index, LETTERS, engine, **shape))
    assert result.records == len(answered)
    assert result.exact_match == pytest.approx(expected / len(answered))
    event("some are right" if expected else "none is right")
