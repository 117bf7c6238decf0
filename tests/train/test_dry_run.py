"""A dry run finds all mistakes at once, tells what would run, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support
from train_support import TOKENS, train

from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.errors import InputError, RunError
from cpm_bee.files import exclusive
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train import data_size
from cpm_bee.train.options import Options
from cpm_bee.train.setup import finetune


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """All files and folders, with what changes when they are written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(folder.rglob("*"))
    }


class Bench:
    """Dry runs on a workspace of their own, of which each must leave everything as it is."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.workspace = train_support.make_workspace(folder)
        self.folder = folder
        self.save = folder / "results"
        self.plan: list[str] = []
        self._capsys = capsys

    def run(self, **values: Any) -> list[str]:
        """The lines that a dry run prints, without those of the plan, which go to `plan`."""
        values = {"use_delta": True, "save": self.save, **values}
        before = snapshot(self.folder)
        self._capsys.readouterr()
        try:
            flags = self.workspace.flags(values.pop("save"), dry_run=True, **values)
            finetune(Options.parse(flags))
        finally:
            assert snapshot(self.folder) == before
        lines = self._capsys.readouterr().out.splitlines()
        # The plan, which ends with the last line but one, has tests of its own.
        end = len(lines) - 1
        begin = next((i for i, line in enumerate(lines) if line.startswith("plan: ")), end)
        self.plan = lines[begin:end]
        return [*lines[:begin], lines[-1]]

    def problems(self, **values: Any) -> list[str]:
        """The lines of its refusal, without the header."""
        with pytest.raises(InputError) as caught:
            self.run(**values)
        header, *lines = str(caught.value).splitlines()
        assert header == "this run cannot start:"
        return lines


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: None) -> Bench:
    return Bench(tmp_path, capsys)


def test_it_tells_what_the_run_then_tells(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"eval_dataset": bench.workspace.eval, "max_length": 30, "epoch": 2}
    told = bench.run(**values)
    train(bench.workspace, bench.save, use_delta=True, **values)
    printed = capsys.readouterr().out.splitlines()
    steps = len([line for line in printed if line.startswith("| Epoch")])
    # The line of checkpointing tells the free memory, which may differ.
    common = [line for line in told if line in printed and not line.startswith("checkpointing")]
    beginnings = ["engine", "model", "training:", "warning:", "evaluation:", "warning:", "one"]
    assert [line.split()[0] for line in common] == beginnings
    (named,) = [line for line in told if line.startswith("steps: about")]
    per_epoch, total = (int(w) for w in named.split() if w.isdigit())
    assert total == 2 * per_epoch and total - 4 <= steps - 4 <= total
    assert "a step: 4 rows of 30 tokens (--batch-size 4 x --accumulate 1 x 1 process(es))" in told
    assert any(line.startswith("checkpointing none: a step needs less than") for line in told)
    results = f"results: {bench.save / 'cpm_bee_finetune-delta-best.pt'}, "
    assert any(line.startswith(results) for line in told)
    assert not any("would be moved" in line for line in told)
    # With the index that the run has made it tells the same, and of the files that are there now.
    again = bench.run(**values)
    moved = [line for line in again if line not in told and not line.startswith("checkpointing")]
    previous = bench.save / "cpm_bee_finetune-previous"
    assert moved == [f"the files of the previous run would be moved to {previous}"]
    assert len(again) == len(told) + 1


def test_it_tells_of_a_run_that_writes_the_same_files(bench: Bench) -> None:
    with exclusive(bench.save / ".cpm_bee_finetune.lock", "is writing"):
        (line,) = bench.problems()
        assert f"process {os.getpid()} on " in line and "give another --save-name" in line
        bench.run(save_name="other")
    bench.run()


def as_rank_0_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/finetune_cpm_bee.sh starts a dry run before that many processes."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, str(value))


def test_it_plans_for_all_processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank_0_of(4, monkeypatch)
    told = bench.run(accumulate=2)
    assert any(line.startswith("engine torch, 4 process(es) on cpu") for line in told)
    assert any(line.startswith("a step: 32 rows of 64 tokens") for line in told)
    assert any(line.startswith("parallel ddp, each process with the whole model") for line in told)
    told = bench.run(parallel="fsdp", offload=True)
    fsdp = "parallel fsdp, each process with a part of every tensor, in host memory: as requested"
    assert fsdp in told


def test_only_the_checks_where_a_run_follows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told = bench.run()
    assert len(bench.plan) > 3
    monkeypatch.setenv("CPM_BEE_CHECKS_ONLY", "1")
    again = bench.run()
    assert bench.plan == []
    free = "checkpointing"  # the line of it tells the free memory, which may differ
    told, again = ([t for t in lines if not t.startswith(free)] for lines in (told, again))
    assert told == again


def test_a_plan_that_cannot_be_made_is_no_mistake_of_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("a step could not be measured: no room")

    monkeypatch.setattr("cpm_bee.train.dry_run.plan_lines", fail)
    assert "no plan: a step could not be measured: no room" in bench.run()


def test_it_joins_no_process_and_reads_no_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run does not do this")

    for name in ("init_process_group", "rendezvous"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    monkeypatch.setattr("cpm_bee.pretrained.PretrainedModel.materialize", refuse)
    monkeypatch.setattr("cpm_bee.quantize.cache.quantized_entries", refuse)
    monkeypatch.setattr("cpm_bee.pretrained.quantized_entries", refuse)
    as_rank_0_of(2, monkeypatch)
    told = bench.run(quantize="int8")
    total = sum(
        tensor.numel()
        for tensor in load_tensors(bench.workspace.model / "pytorch_model.bin", "x").values()
    )
    assert any(line.startswith(f"model with {total + 1024:,} parameters, 1,024") for line in told)


def test_everything_that_is_wrong_is_told_at_once(bench: Bench) -> None:
    file = bench.folder / "file"
    file.write_text("")
    (bench.folder / "empty").mkdir()
    none = bench.folder / "none"
    lines = bench.problems(
        dataset=bench.folder / "empty", eval_dataset=none, vocab=none, model_config=none,
        save=file / "results", save_name="a/b", tensorboard=file, device="abacus",
        delta_targets="w_9", delta_dropout=2, seed=2**60, offload=True,
    )  # fmt: skip
    expected = [
        "--offload: needs --parallel fsdp",
        "--offload: needs several processes",
        "--delta-dropout: must be less than 1",
        f"--seed {2**60}: must be less",
        f"--save {file / 'results'}: {file} is a file",
        f"--tensorboard {file}: is a file",
        "--save-name a/b: must be a name",
        f"--eval-dataset {none}: no such folder",
        f"--model-config {none}: no such file",
        f"--vocab {none}: no such file",
        "--device abacus: no such device",
        "--delta-targets: w_9 is not a layer",
        f"{bench.folder / 'empty'}: expected a binary dataset",
        "make one with: python preprocess_dataset.py",
    ]
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith(f"  {text}")


def test_files_are_checked_each_alone_where_one_is_missing(bench: Bench) -> None:
    config, vocabulary = bench.folder / "config.json", bench.folder / "vocab.txt"
    config.write_text("[]")
    vocabulary.write_text("a\na\n")
    lines = bench.problems(load=bench.folder / "none", model_config=config, vocab=vocabulary)
    assert (
        len([line for line in lines if f"{config}: a model config is a JSON object" in line]) == 1
    )
    assert any(str(vocabulary) in line for line in lines)
    assert lines[0].startswith(f"  --load {bench.folder / 'none'}: no such checkpoint")
    checkpoint = bench.folder / "model.bin"
    checkpoint.write_bytes(b"not a checkpoint")
    lines = bench.problems(load=checkpoint, vocab=bench.folder / "none")
    assert len(lines) == 2 and str(checkpoint) in lines[1]


# ------------------------------------------------------------------ each kind of mistake

Mistake = Callable[[Bench], tuple[dict[str, Any], list[str]]]
MISTAKES: list[Mistake] = []


def mistake(function: Mistake) -> Mistake:
    """Makes one, and returns the flags of the run and what must be told of it."""
    MISTAKES.append(function)
    return function


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__.lstrip("_"))
def test_mistake(bench: Bench, make: Mistake) -> None:
    values, expected = make(bench)
    # Another one beside it hides nothing.
    lines = bench.problems(**values, save_name="a/b")
    for text in [*expected, "--save-name a/b"]:
        assert len([line for line in lines if text in line]) == 1, (text, lines)


@mistake
def _config_and_vocabulary_of_another_model(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    path, vocabulary = bench.folder / "config.json", bench.folder / "vocab.txt"
    config = replace(train_support.CONFIG, num_heads=4, dim_ff=8)
    path.write_text(json.dumps(config.to_dict()))
    vocabulary.write_text("\n".join(TOKENS[:-1]))
    expected = ["num_heads: 4", "dim_ff: 8", f"{vocabulary}: has {len(TOKENS) - 1} tokens"]
    return {"model_config": path, "vocab": vocabulary}, expected


@mistake
def _checkpoint_without_a_tensor(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    path = bench.workspace.model / "pytorch_model.bin"
    weights = dict(load_tensors(path, "a checkpoint"))
    dropped = [n for n in weights if n.endswith("layernorm_before_ffn.weight")]
    save_tensors(path, {n: t for n, t in weights.items() if n not in dropped})
    assert dropped
    return {}, [f"{name}: is missing" for name in dropped]


@mistake
def _quantization_that_does_not_fit(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"quantize": "nf4"}, ["--quantize nf4 does not fit this model"]


@mistake
def _full_training_of_a_quantized_base(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"quantize": "int8", "use_delta": None}, ["needs --use-delta"]


@mistake
def _targets_that_are_pruned(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    config = replace(train_support.CONFIG, mask_modules=((False, True), (False, True)))
    train_support.make_model(bench.folder / "pruned", config)
    values = {"load": bench.folder / "pruned", "delta_targets": "w_0"}
    return values, ["--delta-targets: this model has none of these layers"]


@mistake
def _bmtrain_without_a_gpu(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"engine": "bmtrain"}, ["--engine bmtrain: runs on GPUs only"]


@mistake
def _attention_without_a_gpu(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"attention": "flex"}, ["--attention flex: it has no backward pass on a cpu"]


@mistake
def _random_start_without_config(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"load": None, "use_delta": None}, ["a random start (no --load) needs --model-config"]


@mistake
def _meta_that_is_no_json(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    (bench.workspace.train / "meta.bin").write_text("{")
    return {}, [f"{bench.workspace.train / 'meta.bin'}:1"]


@mistake
def _data_that_is_cut_off(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    for folder in (bench.workspace.train, bench.workspace.eval):
        with open(folder / "data", "r+b") as file:
            file.truncate(100)
    values = {"eval_dataset": bench.workspace.eval}
    return values, [
        f"{folder / 'data'}: has 100 bytes"
        for folder in (bench.workspace.train, bench.workspace.eval)
    ]


@mistake
def _records_that_are_too_long(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    folders = [bench.workspace.train, bench.workspace.eval]
    counts = (train_support.TRAINING, train_support.EVALUATION)
    expected = [f"{f}: none of its {n} records fits" for f, n in zip(folders, counts, strict=True)]
    return {"eval_dataset": bench.workspace.eval, "max_length": 3}, expected


@mistake
def _an_evaluation_set_without_records(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    empty = bench.folder / "bin_data" / "none"
    shutil.copytree(bench.workspace.eval, empty)
    meta = json.loads((empty / "meta.bin").read_text())
    (empty / "meta.bin").write_text(json.dumps({**meta, "mask": True}))
    return {"eval_dataset": empty}, [f"{empty}: none of its 0 records fits"]


@mistake
def _records_that_the_model_cannot_read(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    bad: list[Any] = [{"input": f"<no{i}>", "<ans>": "b"} for i in "ab"]
    dataset = train_support.make_dataset(bench.folder, "bad", [*train_support.records(3, 0), *bad])
    return {"dataset": dataset}, ["<noa>", "<nob>", "records that this model cannot read"]


@mistake
def _too_few_records_for_a_step(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"drop_last": True, "batch_size": 1000}, ["--drop-last leaves nothing"]


@mistake
def _nothing_to_resume(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    return {"resume": True}, ["there is no saved state to resume from"]


def test_a_state_of_another_run_is_refused(bench: Bench) -> None:
    train(bench.workspace, bench.save, use_delta=True, max_steps=2)
    assert "resumes after step 2" in bench.run(resume=True)
    lines = bench.problems(resume=True, batch_size=2, delta_rank=4, max_length=60)
    for name in ("rows of a step", "--max-length", "delta"):
        assert any(line.strip().startswith(name) for line in lines)
    path = bench.save / "cpm_bee_finetune-state.pt"
    (bench.save / "cpm_bee_finetune-state-0.pt").unlink()  # which would be used instead
    path.write_bytes(b"no state")
    (line,) = bench.problems(resume=True)
    assert str(path) in line


def test_a_missing_extra_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench.problems(tensorboard=bench.folder / "events") == [
        "  --tensorboard: needs an extra: pip install -e '.[tensorboard]'"
    ]


# ------------------------------------------------------------------ large data sets


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(data_size, "SAMPLE", 30)
    yield 30


def test_a_large_data_set_is_estimated(bench: Bench, small_sample: int) -> None:
    told = bench.run(max_length=30)
    dataset = BinaryDataset(bench.workspace.train)
    index = TokenIndex.of(dataset, Tokenizer.load(bench.workspace.vocabulary))
    exact = bench.run(max_length=30)
    fitting = int((index.lengths[:small_sample] <= 30).sum())
    assert 0 < fitting < small_sample
    assert f"training: about {2 * fitting} records" in told
    (line,) = [line for line in exact if line.startswith("training: ")]
    assert line == f"training: {int((index.lengths <= 30).sum())} records"


def test_none_of_the_first_records_fits(bench: Bench, small_sample: int) -> None:
    # Others may: no mistake can be told.
    told = bench.run(max_length=3)
    assert "training: about 0 records" in told
    assert any(line.startswith("warning: about 60 training records (100.00%)") for line in told)
    assert "checkpointing: none of the first records fits into --max-length" in told


def test_it_is_refused_by_exit_status_2(bench: Bench) -> None:
    flags = bench.workspace.flags(bench.save, use_delta=True, dry_run=True)
    command = [sys.executable, str(train_support.SCRIPT), *flags]
    status, output, errors = train_support.finish(train_support.start(command, bench.folder))
    assert (status, errors) == (0, "")
    assert output.endswith("dry run: no problems were found, and nothing was written\n")
    command += ["--save-name", "a/b"]
    status, output, errors = train_support.finish(train_support.start(command, bench.folder))
    assert (status, output) == (2, "")
    assert errors.startswith("error: this run cannot start: (explain: E109)\n  --save-name a/b")
    assert not bench.save.exists()
