"""Sample answers are those that generation with beam size 1 writes, up to the first wrong token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_support
from train_support import Workspace

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.pretrained import load_pretrained
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.evaluation import evaluate
from cpm_bee.train.samples import _answer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    with train_support.one_thread():
        workspace = train_support.make_workspace(tmp_path_factory.mktemp("learned"))
        save = tmp_path_factory.mktemp("learned-run")
        train_support.train(workspace, save, epoch=12, batch_size=2)
    return workspace, save / "cpm_bee_finetune-last.pt"


@pytest.mark.slow
def test_they_are_what_generation_writes(learned: tuple[Workspace, Path]) -> None:
    workspace, path = learned
    pretrained = load_pretrained(str(path), "auto", None, torch.float32, CPU)
    model, tokenizer = pretrained.model, pretrained.tokenizer
    index = TokenIndex.of(BinaryDataset(workspace.eval), tokenizer)
    engine = TorchEngine(CPU, torch.float32)
    loader = DataLoader(index, tokenizer, engine, rows=3, max_length=64, as_generated=True)
    result = evaluate(model, engine, loader, num_samples=100)
    assert len(result.samples) == len({s.number for s in result.samples}) == result.records
    right = sum(s.is_correct for s in result.samples)
    assert right / result.records == pytest.approx(result.exact_match)
    assert 0 < right < result.records
    model.eval()
    generator = Generator(model, tokenizer)
    options = GenerationOptions(beam_size=1, max_length=20)
    for sample in result.samples:
        record = index.source(sample.number)
        [output] = generator.search([record], options)
        filled = output.filled()
        assert filled is not None
        written = _answer({**record, "<ans>": filled["<ans>"]})
        assert sample.expected == _answer(record)
        if sample.is_correct:
            assert sample.written == sample.expected == written
        else:
            shown = sample.written.partition("…")[0]
            assert written.startswith(shown) and sample.written != sample.expected


def test_without_a_number_there_are_none(learned: tuple[Workspace, Path]) -> None:
    workspace, path = learned
    pretrained = load_pretrained(str(path), "auto", None, torch.float32, CPU)
    index = TokenIndex.of(BinaryDataset(workspace.eval), pretrained.tokenizer)
    engine = TorchEngine(CPU, torch.float32)
    loader = DataLoader(
        index, pretrained.tokenizer, engine, rows=3, max_length=64, as_generated=True
    )
    assert evaluate(pretrained.model, engine, loader).samples == []
    few = evaluate(pretrained.model, engine, loader, 3).samples
    assert [s.number for s in few] == [
        s.number for s in evaluate(pretrained.model, engine, loader, 5).samples[:3]
    ]
    assert all(s.context and s.expected for s in few)
