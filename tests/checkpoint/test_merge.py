from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import forked
import pytest
import rounding
import tiny
import torch
from folders import bits, make_base, make_delta
from support import run_script

from cpm_bee import delta
from cpm_bee.checkpoint import merge as merging
from cpm_bee.checkpoint import streamed_logits
from cpm_bee.checkpoint.convert import SourceModel, convert
from cpm_bee.checkpoint.merge import MergeReport, at_random, merge, to_nearest
from cpm_bee.checkpoint.model_folder import ModelFolder
from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions, WeightedDelta
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.delta import TARGETS, DeltaConfig, DeltaFile
from cpm_bee.errors import InputError, RunError
from cpm_bee.model.network import CPMBee

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = DeltaConfig(rank=3, alpha=5.5, targets=TARGETS)


def run(base: Path, deltas: list[Any], output: Path, **values: Any) -> MergeReport:
    flags = ["--load", base, "--output", output]
    for name, value in values.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", value]
    for given in deltas:
        flags += ["--delta", given]
    return merge(MergeOptions.parse([str(flag) for flag in flags]))


def loaded_delta(base: Path, file: Path, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """The change of each weight, in double precision, by docs/format.md §7."""
    read = DeltaFile.read(file)
    changes = {}
    for name, a in read.tensors.items():
        if name.endswith(".lora.lora_A"):
            linear = name.removesuffix(".lora.lora_A")
            b = read.tensors[f"{linear}.lora.lora_B"]
            factor = weight * math.sqrt(a.shape[1]) * read.config.alpha / read.config.rank
            changes[f"{linear}.weight"] = factor * b.double() @ a.double()
    return changes


# ------------------------------------------------------------------ what is merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, folders.PRUNED], ids=["whole", "pruned"])
def test_every_weight_is_the_nearest_to_the_sum(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", dtype, **changes)
    configs = (DeltaConfig(), ALL)
    files = [make_delta(tmp_path / f"{i}.pt", base, c, i) for i, c in enumerate(configs)]
    report = run(base, [f"{files[0]}=-0.5", files[1]], tmp_path / "merged")
    weights, merged = (Checkpoint(f).entries for f in (base, tmp_path / "merged"))
    sums = [loaded_delta(base, files[0], -0.5), loaded_delta(base, files[1])]
    assert weights.keys() == merged.keys()
    changed = 0
    for name, entry in weights.items():
        value, found = entry.read(), merged[name].read()
        assert found.dtype == dtype
        parts = [s[name] for s in sums if name in s]
        if not parts:
            assert torch.equal(found, value)
            continue
        changed += 1
        exact = value.double() + sum(parts)
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        others = [(found.view(integer) + step).view(dtype) for step in (1, -1)]  # its neighbours
        error = (found.double() - exact).abs()
        for other in others:
            assert (error <= (other.double() - exact).abs() + 2.0**-23 * exact.abs()).all()
    assert report.num_layers == changed > 0
    assert report.dtypes == str(dtype).removeprefix("torch.")
    assert 0 < report.error <= report.allowed


def test_the_merged_model_computes_the_same(tmp_path: Path) -> None:
    """Loaded as any model; with both deltas beside the base as the expected result."""
    base = make_base(tmp_path / "base")
    files = [make_delta(tmp_path / f"{i}.pt", base, ALL, i) for i in range(2)]
    run(base, [files[0], f"{files[1]}=0.25"], tmp_path / "merged")
    batch = folders.batch()
    merged = folders.load(tmp_path / "merged").model.eval()
    double = copy.deepcopy(merged).double()
    # One delta of twice the rank: the same sum.
    parts = [DeltaFile.read(file).tensors for file in files]
    joined = {}
    for name in parts[0]:
        a, b = (part[name] for part in parts)
        joined[name] = torch.cat([a, b]) if name.endswith("A") else torch.cat([a, b * 0.25], dim=1)
    path = tmp_path / "joined.pt"
    delta.save(path, joined, replace(ALL, rank=6, alpha=11), None, None)
    ours = folders.load(base).model.eval()
    delta.load(ours, path, "", "")

    @torch.no_grad()
    def logits(model: CPMBee) -> torch.Tensor:
        return model(batch)

    with rounding.double_precision():
        exact = logits(copy.deepcopy(ours).double())
        difference = rounding.relative_error(logits(double), exact)
    assert 0 < difference < 1e-5  # the rounding of the weights to fp32
    samples = []
    for seed in range(3):
        nudged = copy.deepcopy(ours)
        rounding.nudge(dict(nudged.named_parameters()), seed)
        samples.append(logits(nudged))
    rounding.assert_as_exact(logits(merged), samples, exact, "logits of the merged model")


def test_a_delta_that_changes_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    report = run(base, [f"{file}=0"], tmp_path / "merged")
    assert report.error == 0
    assert bits(tmp_path / "merged") == bits(base)


def test_formats_of_the_result(tmp_path: Path) -> None:
    """That of the base unless another is asked for; in small files."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    theirs = tmp_path / "hf"
    convert(
        ConvertOptions.parse(["--input", str(base), "--to", "huggingface", "--output", str(theirs)])
    )
    file = make_delta(tmp_path / "d.pt", base, ALL)
    first = ["config.json", "pytorch_model.bin", "vocab.txt"]
    shard = {"shard-size": 4e-6}
    run(base, [file], tmp_path / "a")
    run(theirs, [file], tmp_path / "b", **shard)
    run(theirs, [file], tmp_path / "c", to="native")
    run(base, [file], tmp_path / "d", to="huggingface")
    names = {x: sorted(p.name for p in (tmp_path / x).iterdir()) for x in "abcd"}
    assert names["a"] == names["c"] == first
    assert names["d"] == ["config.json", "model.safetensors", "vocab.txt"]
    assert "model.safetensors.index.json" in names["b"] and len(names["b"]) > 5
    results = [bits(tmp_path / x) for x in "abcd"]
    assert all(result == results[0] for result in results) and results[0] != bits(base)


# ------------------------------------------------------------------ the check


def mistakes() -> dict[str, Any]:
    original, write = merging.merged_weight, ModelFolder.write

    def wrong_factor(weight: Any, loras: Any, rounding: Any) -> torch.Tensor:
        smaller = [copy.deepcopy(lora) for lora in loras]
        for lora in smaller:
            lora.scale /= math.sqrt(weight.shape[1])
        return original(weight, smaller, rounding)

    def slightly_wrong(weight: Any, loras: Any, rounding: Any) -> torch.Tensor:
        return original(weight * 1.02, loras, rounding)

    def first_delta_only(weight: Any, loras: Any, rounding: Any) -> torch.Tensor:
        return original(weight, loras[:1], rounding)

    def wrong_value(self: ModelFolder, folder: Path, values: Any) -> None:
        def changed() -> Any:
            for name, value in values:
                if name.endswith("layers.1.ffn.ffn.w_in.w_0.weight"):
                    value = value.clone()
                    value[3, 2] = torch.nextafter(value[3, 2], torch.tensor(9.0))
                yield name, value

        write(self, folder, changed())

    return {
        "merged_weight": [wrong_factor, slightly_wrong, first_delta_only],
        "write": [wrong_value],
    }


@pytest.mark.parametrize("place", mistakes())
@pytest.mark.parametrize("number", range(3))
def test_a_mistake_is_found_and_nothing_is_kept(
    tmp_path: Path, place: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number >= len(mistakes()[place]):
        return
    base = make_base(tmp_path / "base")
    files = [make_delta(tmp_path / f"{i}.pt", base, ALL, i) for i in range(2)]
    run(base, files[:1], tmp_path / "merged")
    before = bits(tmp_path / "merged")
    owner: Any = merging if place == "merged_weight" else ModelFolder
    monkeypatch.setattr(owner, place, mistakes()[place][number])
    with pytest.raises(RunError, match="nothing was kept"):
        run(base, files, tmp_path / "new" / "merged")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="nothing was kept"):
        run(base, files, tmp_path / "merged", overwrite=True)
    assert bits(tmp_path / "merged") == before
    assert not list(tmp_path.glob(".*"))


def test_streamed_logits_are_those_of_the_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16, **folders.PRUNED)
    source = SourceModel.open(str(base), None)
    batch = streamed_logits.probe_batch(source.pretrained.tokenizer)
    assert batch.num_tokens > 40 and len(batch.targets) > 10
    entries = source.entries
    found = streamed_logits.streamed_logits(
        source.pretrained.model, batch, lambda name: entries[name].read()
    )
    with rounding.double_precision(), torch.no_grad():
        exact = folders.load(base).model.double().eval()(batch)
    assert found.dtype == torch.float64
    assert rounding.relative_error(found, exact) < 1e-6  # norms work in fp32
    rest = source.pretrained.model.encoder.parameters()
    assert all(p.device.type == "meta" for p in rest)  # no weight was kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_at_random(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator, dtype=torch.float64) * 3
    nearest = to_nearest(exact, dtype).double()
    at_chance = at_random(exact, dtype, generator=generator).double()
    info = torch.finfo(dtype)
    spacing = info.eps * 2 ** torch.floor(torch.log2(nearest.abs()))
    spacing.clamp_(min=info.tiny * info.eps)
    assert ((at_chance - exact).abs() <= spacing * 1.001).all()
    assert ((nearest - exact) / spacing).square().mean().item() == pytest.approx(1 / 12, rel=0.02)
    assert ((at_chance - nearest) / spacing).square().mean().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(at_random(nearest, dtype, generator=generator).double(), nearest)
    zeros = torch.tensor([0.0, -0.0, info.tiny / 4], dtype=torch.float64)
    assert (at_random(zeros, dtype, generator=generator).double() == zeros.to(dtype)).all()


@pytest.mark.slow
def test_little_memory_is_needed(tmp_path: Path) -> None:
    """The tensor at hand, in its type and in double precision, not the model."""
    forked.call(check_memory, tmp_path)


def check_memory(folder: Path) -> None:
    base = make_base(
        folder / "base", torch.float16, dim_model=256, dim_head=128, dim_ff=512, num_layers=12
    )
    file = make_delta(folder / "d.pt", base, DeltaConfig(targets=TARGETS, rank=1))
    largest = 256 * 512
    peak = 0

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **values: Any) -> Any:
            nonlocal peak
            result = function(*arguments, **values)
            peak = max(peak, tiny.allocated_memory())
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "merged_weight", watched(merging.merged_weight))
        patch.setattr(streamed_logits, "set_parameter", watched(streamed_logits.set_parameter))
        run(base, [file], folder / "first")  # buffers of libraries stay
        before, peak = tiny.allocated_memory(), 0
        run(base, [file], folder / "second")
    model = (base / "pytorch_model.bin").stat().st_size
    # Twice a tensor in double precision and in fp16; the rest is the deltas and the record.
    assert largest * (8 + 2) < peak - before < 2 * largest * (8 + 2) + 1e6 < model / 2


# ------------------------------------------------------------------ refusals


def refusal(*arguments: Any, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        run(*arguments, **values)
    return str(caught.value)


def test_deltas_of_others_are_refused_together(tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", num_layers=1)
    fitting = make_delta(tmp_path / "fits.pt", base, DeltaConfig())
    foreign = make_delta(tmp_path / "foreign.pt", other, DeltaConfig())
    prints = (folders.load(base).fingerprint, "2" * 64)
    reworded = tmp_path / "reworded.pt"
    delta.save(reworded, DeltaFile.read(fitting).tensors, DeltaConfig(), *prints)
    message = refusal(base, [fitting, foreign, reworded, tmp_path / "none.pt"], tmp_path / "out")
    assert message.startswith("these deltas cannot be merged:")
    assert f"{foreign}: was trained on another base model" in message
    assert f"{reworded}: was trained with another vocabulary" in message
    assert f"{tmp_path / 'none.pt'}: no such delta file" in message
    assert str(fitting) not in message
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    message = refusal(base, [f"{file}=1e6"], tmp_path / "out")
    assert "project_q.weight would have values after merging" in message and "float16" in message
    assert not (tmp_path / "out").exists()


def test_outputs(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    assert "which is read" in refusal(base, [file], base, overwrite=True)
    assert "which is read" in refusal(base / "pytorch_model.bin", [file], base, overwrite=True)
    inside = tmp_path / "deltas"
    inside.mkdir()
    shutil.copy(file, inside)
    assert "which is read" in refusal(base, [inside / "d.pt"], inside, overwrite=True)
    run(base, [file], tmp_path / "out")
    assert "--overwrite" in refusal(base, [file], tmp_path / "out")
    run(base, [f"{file}=0"], tmp_path / "out", overwrite=True)
    assert bits(tmp_path / "out") == bits(base)


def test_alpha_of_another_tool(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base")
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig(alpha=4))
    torch.save(DeltaFile.read(file).tensors, tmp_path / "bare.pt")
    run(base, [file], tmp_path / "own")
    run(base, [tmp_path / "bare.pt"], tmp_path / "given", **{"delta-alpha": 4})
    assert bits(tmp_path / "own") == bits(tmp_path / "given")
    assert not caplog.records
    run(base, [tmp_path / "bare.pt"], tmp_path / "assumed")
    assert "alpha 16 is assumed" in caplog.text
    assert "was trained with alpha 4" in refusal(base, [file], tmp_path / "x", **{"delta-alpha": 8})


def test_weights_of_deltas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.5").touch()
    for text, expected in {
        "a.pt": ("a.pt", 1.0),
        "a.pt=0.5": ("a.pt", 0.5),
        "a.pt=-1e-1": ("a.pt", -0.1),
        "lr=0.5": ("lr=0.5", 1.0),
        "lr=0.5=2": ("lr=0.5", 2.0),
        "lr=0.1/a.pt": ("lr=0.1/a.pt", 1.0),
    }.items():
        assert WeightedDelta.parse(text) == expected
    for text in ("=2", "a.pt=nan", "a.pt=inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="FILE=WEIGHT"):
            WeightedDelta.parse(text)


def test_the_script(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    file = make_delta(tmp_path / "d.pt", base, DeltaConfig())
    done = run_script(
        "src/merge_delta.py", "--load", base, "--delta", f"{file}=0.5", "--delta", file,
        "--output", tmp_path / "my model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, check, _ = done.stdout.splitlines()
    assert first == f"written: {tmp_path / 'my model'}, 2 deltas merged into 4 layers"
    assert "rounding to float16 explains" in check
    answered = forked.run(
        folders.printed_command(done.stdout), input='{"input": "abc", "<ans>": ""}\n',
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["input"] == "abc"
