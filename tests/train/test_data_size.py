"""Which records count: those with an answer that fit into a row."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import train_support

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import InputError
from cpm_bee.records import Record
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.data_size import DataSize, StepShape, survey

RECORDS: list[Record] = [
    {"input": "a", "<ans>": "b"},
    {"input": "a", "<ans>": ""},
    {"input": "a", "<ans>": {"x": "", "b": ""}},
    {"input": "é", "<ans>": "é"},  # of the context, so generation can write it
    {"input": "a", "<ans>": "é"},
    {"input": "春" * 60, "<ans>": "b"},
    {"options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option_1>"},
]


def index_of(folder: Path, records: list[Record]) -> TokenIndex:
    dataset = BinaryDataset(train_support.make_dataset(folder, "set", records))
    return TokenIndex.of(dataset, tiny.TOKENIZER)


def loader_of(index: TokenIndex, **options: Any) -> DataLoader:
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    return DataLoader(index, tiny.TOKENIZER, engine, rows=2, max_length=40, **options)


def test_records_are_counted_by_what_can_be_done_with_them(tmp_path: Path) -> None:
    index = index_of(tmp_path, RECORDS)
    expected = DataSize(4, 1, 1, num_unanswered=2, num_unwritable=1)
    size = DataSize.of(tmp_path, index.lengths, index.answers, StepShape(2, 40))
    assert size == expected == loader_of(index).size
    found = survey(index.dataset, tiny.TOKENIZER, StepShape(2, 40))
    assert (found.size, found.is_exact) == (expected, True)


def test_in_context_samples_count(tmp_path: Path) -> None:
    """Those of the first epoch, exactly where there is an index and estimated where not."""
    index = index_of(tmp_path, RECORDS * 300)
    shape = StepShape(2, 40, shuffle_seed=1, in_context=(0.25, 0.75))
    loader = loader_of(index, shuffle_seed=1, in_context=(0.25, 0.75))
    size = loader.size
    found = survey(index.dataset, tiny.TOKENIZER, shape)
    assert (found.size, found.is_exact) == (size, True)
    assert found.lengths.tolist() == loader.lengths(0).tolist()
    tokens = sum(step.tokens for step, _ in loader.batches(0))
    assert size.min_steps == -(-tokens // 80)
    [with_one] = size.in_context
    assert with_one + size.num_shortened > 0.7 * size.num_records and with_one > 0
    shutil.rmtree(next(index.dataset.folder.glob("*token_index*")))
    estimate = survey(index.dataset, tiny.TOKENIZER, shape)
    assert not estimate.is_exact
    assert estimate.size.in_context[0] == pytest.approx(with_one, rel=0.2)
    assert estimate.size.min_steps == pytest.approx(size.min_steps, rel=0.1)


def test_unanswered_records_are_left_out(tmp_path: Path) -> None:
    index = index_of(tmp_path, RECORDS)
    for loader in (loader_of(index), loader_of(index, shuffle_seed=1)):
        used = [n for step, _ in loader.batches(0) for share in step.shares for n in share]
        answers = [index.source(n)["<ans>"] for n in used]
        assert sorted(map(str, answers)) == ["<option_1>", "b", "é", "é"]


def test_a_set_without_any_answer_is_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path, [{"input": "a", "<ans>": ""}, {"input": "b", "<ans>": {"x": ""}}])
    with pytest.raises(InputError, match="none of its 2 records has an answer"):
        loader_of(index)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    loader = loader_of(index_of(tmp_path, RECORDS))
    [line] = loader.unwritable_answers()
    assert str(tmp_path) in line and line.endswith(": 'é'")
    numbers = list(range(len(RECORDS)))
    written = [loader._index.source(n)["<ans>"] for n in numbers if loader.is_writable(numbers)[n]]
    assert sorted(map(str, written)) == ["<option_1>", "b", "b", "é"]
