"""The bmtrain engine on one and two processes (on CPUs) against the torch engine on one."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bmtrain_cpu
import pytest
import rounding
import tiny
import torch
import train_support
from bmtrain_runs import (
    BIG,
    CPU,
    ON_TWO,
    RESUMED,
    RUNS,
    SETTINGS,
    Case,
    make_model,
    resumed,
    state_path,
    train,
)

from cpm_bee.checkpoint.reader import save_tensors
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.network import CPMBee

# Largest relative difference of the losses, of the gradient norms, and of all trained values taken
# together, in 16 bits; in fp32 it is measured (see `rounding`). The torch engine trains fp32
# weights under autocast, bmtrain 16-bit ones.
BOUNDS = {
    torch.float16: (2e-3, 5e-3, 3e-2),
    torch.bfloat16: (1e-2, 5e-2, 5e-2),
}


References = dict[str, dict[str, Any]]
# Of each case in fp32: a run in double precision, and runs in fp32 that are trusted.
Samples = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]
Found = dict[tuple[int, int], dict[str, Any]]  # (processes, rank) -> what `main` found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bmtrain")
    big = CPMBee(tiny.make_config(**BIG)).half()
    save_tensors(folder / "big.bin", dict(big.state_dict()))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> References:
    with train_support.one_thread():
        return {
            name: train(TorchEngine(CPU, case.dtype), case, state_path(folder, "torch", name))
            for name, case in RUNS.items()
        }


@pytest.fixture(scope="module")
def samples(reference: References) -> Samples:
    made: dict[Case, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    with train_support.one_thread():
        for name, case in RUNS.items():
            same = case._replace(checkpointing=True)  # it changes no result
            if case.dtype == torch.float32 and same not in made:
                made[same] = (
                    exact_run(case),
                    [reference[name], *(nudged_run(case, s) for s in (1, 2))],
                )
    return {
        name: made[case._replace(checkpointing=True)]
        for name, case in RUNS.items()
        if case.dtype == torch.float32
    }


def exact_run(case: Case) -> dict[str, Any]:
    model = make_model(case, torch.float32).double()
    with rounding.double_precision():
        return train(TorchEngine(CPU, case.dtype), case, model=model)


def nudged_run(case: Case, seed: int) -> dict[str, Any]:
    model = make_model(case, torch.float32)
    rounding.nudge(dict(model.named_parameters()), seed)
    return train(TorchEngine(CPU, case.dtype), case, model=model)


@pytest.fixture(scope="module")
def found(folder: Path, reference: References) -> Found:
    bmtrain_cpu.require()
    for world_size in (1, 2):  # in this order: two processes go on from the state of one
        bmtrain_cpu.run_ranks("bmtrain_runs.py", world_size, folder)
    return {
        (world_size, rank): torch.load(folder / f"found-{world_size}-{rank}.pt", weights_only=False)
        for world_size in (1, 2)
        for rank in range(world_size)
    }


def relative(actual: list[float], expected: list[float]) -> float:
    return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True) if e == e)


def moved(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """By how much all trained values, laid end to end, have changed."""
    before = dict(make_model(case, torch.float32).named_parameters())
    assert list(tensors) == [n for n, p in before.items() if p.requires_grad]
    assert all(t.shape == before[n].shape for n, t in tensors.items())
    assert len({t.dtype for t in tensors.values()}) == 1
    return torch.cat([(t - before[n].detach()).flatten() for n, t in tensors.items()])


def compare(
    name: str,
    actual: dict[str, Any],
    references: References,
    samples: Samples,
    part: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """A run, or a part of one, against that part of the torch engine's."""
    case, expected = RUNS[name], part(references[name])
    assert actual["scales"] == expected["scales"]
    assert actual["skipped"] == expected["skipped"]
    assert all(t.dtype == torch.float32 for t in actual["tensors"].values())
    if case.dtype == torch.float32:
        exact, trusted = part(samples[name][0]), [part(run) for run in samples[name][1]]
        for column in ("losses", "norms"):
            values = [run[column] for run in trusted]
            rounding.assert_as_exact(actual[column], values, exact[column], column)
        scores = [torch.cat(run["scores"]) for run in (actual, exact, *trusted)]
        rounding.assert_as_exact(scores[0], scores[2:], scores[1], "scores")
        a, x, *others = (moved(case, run["tensors"]) for run in (actual, exact, *trusted))
        rounding.assert_as_exact(a, others, x, "trained values")
        return
    losses, norms, values = BOUNDS[case.dtype]
    assert relative(actual["losses"], expected["losses"]) < losses
    assert relative(actual["norms"], expected["norms"]) < norms
    a, e = moved(case, actual["tensors"]), moved(case, expected["tensors"])
    assert (a - e).norm() < values * e.norm()
    for mine, other in zip(actual["scores"], expected["scores"], strict=True):
        torch.testing.assert_close(mine, other, rtol=10 * losses, atol=10 * losses)


def after_ten_steps(run: dict[str, Any]) -> dict[str, Any]:
    rest = {name: run[name][10:] for name in ("losses", "norms", "scales", "skipped")}
    return rest | {"scores": run["scores"][2:], "tensors": run["tensors"]}


PAIRS = [(1, name) for name in RUNS] + [(2, name) for name in ON_TWO]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), PAIRS)
def test_training_is_that_of_the_torch_engine(
    found: Found, reference: References, samples: Samples, world_size: int, name: str
) -> None:
    case = RUNS[name]
    expected, actual = reference[name], found[world_size, 0]["runs"][name]
    compare(name, actual, reference, samples)
    if case.dtype == torch.float16:
        assert max(expected["scales"]) == 4096 or case.spoilt is not None
    if case.spoilt is not None:
        assert [i for i, skipped in enumerate(actual["skipped"]) if skipped] == [case.spoilt]
        assert not math.isfinite(actual["norms"][case.spoilt])
        assert actual["scales"][case.spoilt + 1] == actual["scales"][case.spoilt] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), PAIRS)
def test_statistics_are_those_of_the_torch_engine(
    found: Found, reference: References, world_size: int, name: str
) -> None:
    tolerance = 1e-4 if RUNS[name].dtype == torch.float32 else 0.05
    actual = found[world_size, 0]["runs"][name]["statistics"]
    for mine, other in zip(actual, reference[name]["statistics"], strict=True):
        assert mine[:2] == other[:2]
        spread = abs(other.mean) + other.std
        assert mine[2:4] == pytest.approx(other[2:4], abs=tolerance * spread)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_exactly_from_a_saved_state(
    found: Found, world_size: int, name: str
) -> None:
    straight = found[world_size, 0]["runs"][name]
    resumed = found[world_size, 0]["resumed"][f"{name} after bmtrain-{world_size}"]
    for column in ("losses", "norms", "scales", "skipped"):
        assert resumed[column] == straight[column][10:]
    for tensor, value in straight["tensors"].items():
        assert torch.equal(resumed["tensors"][tensor], value)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["bmtrain-1", "torch"])
@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_where_one_was(
    found: Found, reference: References, samples: Samples, name: str, by: str
) -> None:
    resumed = found[2, 0]["resumed"][f"{name} after {by}"]
    compare(name, resumed, reference, samples, after_ten_steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_the_torch_engine_goes_on_where_two_processes_of_bmtrain_were(
    found: Found, folder: Path, reference: References, samples: Samples, name: str
) -> None:
    case = RUNS[name]
    actual = resumed(TorchEngine(CPU, case.dtype), case, state_path(folder, "bmtrain-2", name))
    compare(name, actual, reference, samples, after_ten_steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_decay_is_decoupled_from_the_gradient(
    found: Found, world_size: int, dtype: torch.dtype
) -> None:
    # L2 decay would be a step of Adam, of the size of the rate whatever the weight.
    factor = (1 - 0.5 * 0.1) * (1 - 0.25 * 0.1)
    model = make_model(Case(full=True), torch.float32).to(dtype)
    after = found[world_size, 0]["decay"][str(dtype)]
    for name, parameter in model.named_parameters():
        expected = parameter.detach().float() * factor
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_a_backward_pass_has_no_gradients(found: Found, world_size: int) -> None:
    first, second = found[world_size, 0]["idle"]
    assert first > 0 and second == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_errors_are_told_by_all_ranks(found: Found, rank: int) -> None:
    errors = found[2, rank]["errors"]
    assert "not finite" in errors["nan"] and "not finite" in errors["nan-bf16"]
    assert "overflow at every loss scale" in errors["overflow"]
    assert "other trained tensors" in errors["state"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_values_are_reduced_over_ranks(found: Found, rank: int) -> None:
    sums, largest, nothing = found[2, rank]["reduced"]
    assert sums == [3.0, 2.0**41 + 2, 1.0]  # exactly: more than fp32 can hold
    assert largest == [3, 0, 2**40 + 1]
    assert nothing == []


@pytest.mark.slow
def test_saving_a_delta_gathers_no_base(found: Found) -> None:
    model = make_model(RUNS["delta"], torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for rank in (0, 1):
        traffic = found[2, rank]["traffic"]
        assert traffic["tensors"].keys() == traffic["state"].keys() == {"ncclAllReduce"}
        assert sum(traffic["tensors"]["ncclAllReduce"]) == trained
        assert sum(traffic["state"]["ncclAllReduce"]) == 3 * trained


@pytest.mark.slow
def test_the_exchanges_of_a_pass_do_not_depend_on_its_records(found: Found) -> None:
    # Else processes with other records would wait for each other for ever.
    for rank in (0, 1):
        traffic = found[2, rank]["traffic"]
        assert traffic["one group"] == traffic["many groups"]
        assert list(traffic["one group"]) == ["ncclAllGather"]


@pytest.mark.slow
def test_only_the_first_rank_keeps_what_is_saved(found: Found) -> None:
    assert all(t.numel() > 0 for t in found[2, 0]["runs"]["full"]["tensors"].values())
    assert all(t.numel() == 0 for t in found[2, 1]["runs"]["full"]["tensors"].values())


@pytest.mark.slow
def test_no_process_holds_more_than_its_part_and_a_layer(found: Found) -> None:
    with torch.device("meta"):
        model = CPMBee(tiny.make_config(**BIG))
    whole = 4 * sum(p.numel() for p in model.parameters())
    layer = 4 * sum(p.numel() for p in model.encoder.layers[0].parameters())
    for rank in (0, 1):
        memory = found[2, rank]["memory"]
        assert memory["parts"] == pytest.approx(whole / 2, rel=0.01)
        assert memory["used"] < memory["parts"] + 2 * layer < 0.75 * whole


def test_the_engine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpm_bee.engine import bmtrain_engine

    assert "--engine torch" in (bmtrain_engine.unavailable_reason(CPU) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "bmtrain==1.0.1" in (bmtrain_engine.unavailable_reason(torch.device("cuda")) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert bmtrain_engine.unavailable_reason(torch.device("cuda")) is None
    second = bmtrain_engine.unavailable_reason(torch.device("cuda", 1)) or ""
    assert "CUDA_VISIBLE_DEVICES=1" in second


def test_parts_are_written_before_the_load_stream_gathers_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bmtrain's load stream does not wait for the stream that writes the parts."""
    from cpm_bee.engine import bmtrain_engine

    done: list[object] = []
    gpu = torch.device("cuda", 1)
    part: Any = torch.nn.Parameter(torch.zeros(3))
    part._original_shape, part._start_partition, part._end_partition = torch.Size([3]), 0, 3
    optimizer = types.SimpleNamespace(
        param_groups=[{"params": [part]}],
        state_dict=lambda: {"param_groups": []},
        load_state_dict=lambda state: done.append(part.tolist()),
    )
    monkeypatch.setattr(
        bmtrain_engine, "shard_model", lambda *args: done.append("sharded") or {"w": part}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    engine = object.__new__(bmtrain_engine.BMTrainEngine)  # bmtrain itself needs a GPU
    engine._bmt, engine.device, engine.dtype = None, gpu, torch.float32
    monkeypatch.setattr(engine, "_make_optimizer", lambda: done.append("optimizer"))
    engine.prepare(torch.nn.Module(), SETTINGS)  # type: ignore[arg-type]
    assert done == ["sharded", gpu, "optimizer"]
    engine._optimizer = optimizer
    ones = torch.ones(3)
    moments = {"step": 1.0, "exp_avg": ones, "exp_avg_sq": ones}
    engine.load_training_state({"tensors": {"w": ones}, "optimizer": {"w": moments}})
    assert done[3:] == [[1.0, 1.0, 1.0], gpu]


def test_one_file_imports_bmtrain_and_only_when_asked(root: Path) -> None:
    importing = [
        path.name
        for path in (root / "src").rglob("*.py")
        if re.search(r"^\s*import bmtrain\b", path.read_text(encoding="utf-8"), re.M)
    ]
    assert importing == ["bmtrain_engine.py"]
    __import__("cpm_bee.engine.bmtrain_engine")
    assert "bmtrain" not in sys.modules
