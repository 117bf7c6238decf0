"""All ways to answer and to score agree, record by record, on real records and a tuned delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_support import TINY_BASE, serving
from support import ROOT, run_script

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.loaded_model import load_model
from cpm_bee.generate.options import GenerationOptions, LoadedModelOptions
from cpm_bee.pretrained import PretrainedModel
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.evaluation import Evaluation, evaluate

COUNT = 24
CHECKPOINT = TINY_BASE / "pytorch_model.bin"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(script: str, *arguments: object, cwd: Path) -> None:
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder with 24 records of the sample, and a delta that a few steps on them made."""
    folder: Path = tmp_path_factory.mktemp("agreement")
    reformat = "tutorials/basic_task_finetune/data_reformat.py"
    run(reformat, "--input", ROOT / "raw_data", "--output", "all", cwd=folder)
    lines = (folder / "all" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few").mkdir()
    (folder / "few" / "eval.jsonl").write_text("".join(lines[:COUNT]), encoding="utf-8")
    flags: tuple[object, ...] = ("--input", "few", "--output_path", "bin", "--output_name", "data")
    run("src/preprocess_dataset.py", *flags, cwd=folder)
    flags = ("--dataset", "bin/eval", "--eval-dataset", "bin/eval", "--use-delta", "--lr", 0.01)
    flags += ("--batch-size", 2, "--max-length", 512, "--max-steps", 12, "--epoch", 100)
    flags += ("--load", CHECKPOINT, "--save", "out", "--save-name", "t")
    run("src/finetune_cpm_bee.py", *flags, cwd=folder)
    return folder


def evaluated_in_training(tuned: Path, base: PretrainedModel) -> tuple[Evaluation, dict[str, bool]]:
    """What evaluation in training finds, and for each record whether it counts as correct."""
    index = TokenIndex.of(BinaryDataset(tuned / "bin" / "eval"), base.tokenizer)
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    rows = {"rows": 2, "max_length": 512}
    loader = DataLoader(index, base.tokenizer, engine, **rows, as_generated=True)
    found = evaluate(base.model, engine, loader, num_samples=COUNT)
    numbers = [sample.number for sample in found.samples]
    assert sorted(numbers) == list(range(COUNT))
    texts = [json.dumps(loader.record(number)) for number in numbers]
    return found, {text: own.is_correct for text, own in zip(texts, found.samples, strict=True)}


@pytest.mark.slow
def test_five_ways_to_score_agree_to_the_record(tuned: Path, tmp_path) -> None:
    """Evaluation in training, evaluate.py, generation one by one, in a batch, and the server."""
    records = read(tuned / "few" / "eval.jsonl")
    model = ("--load", CHECKPOINT, "--delta", tuned / "out" / "t-delta-last.pt")
    source = tuned / "few" / "eval.jsonl"
    flags = ("--input", source, "--output", "batch.jsonl", "--beam-size", 1)
    run("src/text_generation.py", *model, *flags, cwd=tmp_path)
    loaded = load_model(LoadedModelOptions(load=str(CHECKPOINT), delta=str(model[3])))
    generator = Generator(loaded.base.model, loaded.base.tokenizer)
    one = [generator.generate(record, GenerationOptions(beam_size=1)) for record in records]
    with serving(tmp_path, *model, "--max-records", COUNT) as server:
        answer = server.post("/v1/generate", records=records, beam_size=1)
        chosen = server.post("/v1/generate", records=records, choices=True).json()["records"]
    run("src/evaluate.py", *model, "--dataset", source, "--output", "results", cwd=tmp_path)
    [samples_file] = (tmp_path / "results").glob("samples_eval_*.jsonl")
    samples = read(samples_file)

    assert one == read(tmp_path / "batch.jsonl") == answer.json()["records"]
    matches = [own["<ans>"] == record["<ans>"] for own, record in zip(one, records, strict=True)]
    assert [bool(sample["exact_match"]) for sample in samples] == matches
    # Of the run the log has the share; the function that found it also tells of each record.
    in_training, correct = evaluated_in_training(tuned, loaded.base)
    assert [correct[json.dumps(record)] for record in records] == matches
    last = [event for event in read(tuned / "out" / "t-log.jsonl") if event["event"] == "eval"][-1]
    assert last["exact_match"] == in_training.exact_match == sum(matches) / COUNT
    assert 0 < sum(matches) < COUNT  # all or nothing would say little
    # And choosing: the server's options are those of evaluate.py.
    assert [sample["choice"] for sample in samples] == [own["<ans>"] for own in chosen]
    assert all(sum(own["<choices>"].values()) == pytest.approx(1) for own in chosen)
