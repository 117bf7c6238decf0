"""Runs of the bmtrain and the torch engine, to be compared.

    python tests/bmtrain_runs.py FOLDER

writes the results of bmtrain in one of several processes to the folder (see
`bmtrain_cpu.run_ranks`).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import bmtrain_cpu
import tiny
import torch

from cpm_bee import delta
from cpm_bee.checkpoint.loading import load_into
from cpm_bee.checkpoint.reader import Checkpoint, load_tensors, save_tensors
from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.engine import Engine, OptimizerSettings
from cpm_bee.errors import RunError
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record

CPU = torch.device("cpu")
STEPS = 20
SETTINGS = OptimizerSettings(
    weight_decay=0.1, clip_grad=1.0, loss_scale=1024.0, loss_scale_factor=2.0, loss_scale_steps=7
)
RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"<ans>": {"<mask_0>": "ü", "<mask_1>": "漢"}, "input": "ab<mask_0><mask_1>"},
    {"input": tiny.chain("x", 12, "ü 漢" * 6), "<ans>": "b"},
    {"input": "b", "<ans>": {"a": {"b": "漢漢", "x": "風"}}},
    {"input": "春" * 40, "<ans>": "春" * 12},
    {"input": "天春", "<ans>": "x"},
]


class Case(NamedTuple):
    """What a run trains: everything, or LoRA on some Linears."""

    dtype: torch.dtype = torch.float32
    full: bool = False
    targets: tuple[str, ...] = ("project_q", "w_0", "w_out")
    checkpointing: bool = True
    dropout: float = 0.0
    pruned: bool = False  # no attention in the first layer
    spoilt: int | None = None  # the step in which the last rank's gradients overflow


RUNS = {
    "delta": Case(),
    "full": Case(full=True),
    "delta-fp16": Case(torch.float16),
    "full-fp16": Case(torch.float16, full=True),
    "delta-pruned": Case(targets=("project_q",), pruned=True),
    "overflow-delta": Case(torch.float16, spoilt=5),
    # On one process only:
    "delta-kept": Case(checkpointing=False),
    "full-kept": Case(full=True, checkpointing=False),
    "full-bf16": Case(torch.bfloat16, full=True),
    "overflow-full": Case(torch.float16, full=True, spoilt=5),
    "dropout": Case(dropout=0.3),
    "dropout-fp16": Case(torch.float16, dropout=0.3),
}
ON_TWO = list(RUNS)[:6]
RESUMED = ("delta", "full-fp16")


def make_model(case: Case, dtype: torch.dtype) -> CPMBee:
    masks = ((True, False), (False, False), (False, False)) if case.pruned else ()
    # With these sizes the border between two processes is within a tensor of each layer.
    model = CPMBee(tiny.make_config(num_layers=3, dim_ff=30, mask_modules=masks))
    model.load_state_dict(dict(initial_values(model, seed=4)))
    with torch.no_grad():  # a table of zeros would hide much
        table = model.position_bias.relative_attention_bias
        table.normal_(generator=torch.Generator().manual_seed(5))
    model.to(case.dtype).to(dtype)  # the same values, however they are held
    if not case.full:
        config = delta.DeltaConfig(rank=7, targets=case.targets, dropout=case.dropout)
        delta.insert(model, config, seed=6)
    model.encoder.set_checkpointing(case.checkpointing)
    return model.train()


def prepared(
    engine: Engine,
    case: Case,
    settings: OptimizerSettings = SETTINGS,
    model: CPMBee | None = None,
) -> CPMBee:
    by_torch = engine.name == "torch"  # which takes a frozen base in the compute type
    if model is None:
        model = make_model(case, case.dtype if by_torch and not case.full else torch.float32)
    engine.prepare(model, settings)
    return model


def share(step: int, rank: int, world_size: int) -> list[Batch | None]:
    """A rank's two micro-batches; in every fourth step only the first rank has records."""
    chosen = [RECORDS[(step + i) % len(RECORDS)] for i in range(1 if step % 4 == 3 else 4)]
    encoded = tiny.encode(chosen)
    pairs = extension_pairs(encoded)
    halves = [encoded[rank::world_size][i::2] for i in range(2)]
    return [collate(half, tiny.TOKENIZER, pairs) if half else None for half in halves]


def advance(
    engine: Engine, model: CPMBee, case: Case, first: int = 0, last: int = STEPS
) -> dict[str, Any]:
    """Train some steps as the trainer does, with an evaluation among them."""
    found: dict[str, Any] = {n: [] for n in ("losses", "norms", "scales", "skipped", "scores")}
    filler = collate(tiny.encode(RECORDS[:1]), tiny.TOKENIZER)
    for step in range(first, last):
        torch.manual_seed(step)
        batches = share(step, engine.rank, engine.world_size)
        (targets,) = engine.reduce([float(sum(b.num_targets for b in batches if b))])
        total = 0.0
        for batch in batches:
            if batch is None and engine.world_size == 1:
                continue
            with engine.autocast():
                loss = model.loss(batch or filler) / targets * (batch is not None)
            if step == case.spoilt and engine.rank == engine.world_size - 1:
                loss = loss * math.inf
            engine.backward(loss)
            total += loss.item()
        found["losses"] += engine.reduce([total])
        found["scales"].append(engine.loss_scale)
        result = engine.step(0.01 / (1 + step))
        found["norms"].append(result.grad_norm)
        found["skipped"].append(result.skipped)
        if step % 6 == 0:
            model.eval()
            with engine.autocast():
                found["scores"].append(model.score(filler).losses)
            model.train()
    return found


def train(
    engine: Engine, case: Case, state: Path | None = None, model: CPMBee | None = None
) -> dict[str, Any]:
    """Train all steps, of `model` or the case's own; the state after ten is saved to `state`."""
    model = prepared(engine, case, model=model)
    first = advance(engine, model, case, 0, 10)
    if state is not None and engine.rank == 0:
        save_tensors(state, engine.training_state())
    elif state is not None:
        engine.training_state()
    rest = advance(engine, model, case, 10)
    found = {name: first[name] + rest[name] for name in first}
    return found | {"statistics": engine.statistics(), "tensors": engine.trained_tensors()}


def resumed(engine: Engine, case: Case, path: Path) -> dict[str, Any]:
    """Train the remaining steps from a file saved by `train`."""
    model = prepared(engine, case)
    engine.load_training_state(load_tensors(path, "a state"))
    found = advance(engine, model, case, 10)
    return found | {"tensors": engine.trained_tensors()}


def state_path(folder: Path, by: str, name: str) -> Path:
    return folder / f"state-{by}-{name}.pt"


def _resume(make: Any, folder: Path) -> dict[str, Any]:
    found = {}
    two = make(torch.float32).world_size == 2
    for by in ("torch", "bmtrain-1", "bmtrain-2") if two else ("bmtrain-1",):
        for name in RESUMED:
            path = state_path(folder, by, name)
            found[f"{name} after {by}"] = resumed(make(RUNS[name].dtype), RUNS[name], path)
    return found


def _traffic(make: Any, bmt: Any) -> dict[str, Any]:
    """Returns the values exchanged by each call, in saving and in two passes."""
    calls: dict[str, list[int]] = {}
    for name in ("ncclAllGather", "ncclAllReduce"):
        call = getattr(bmt.C, name)

        def counted(*values: int, name: str = name, call: Any = call) -> None:
            calls.setdefault(name, []).append(values[2])
            call(*values)

        setattr(bmt.C, name, counted)
    engine, found = make(torch.float32), {}
    model = prepared(engine, RUNS["delta"])
    advance(engine, model, RUNS["delta"], 0, 2)
    for kind, save in (("tensors", engine.trained_tensors), ("state", engine.training_state)):
        calls.clear()
        save()
        found[kind] = dict(calls)
    for kind, chosen in (("one group", RECORDS[:1]), ("many groups", RECORDS)):
        calls.clear()
        model.loss(collate(tiny.encode(chosen), tiny.TOKENIZER))
        found[kind] = dict(calls)
    return found


def _decay(make: Any) -> dict[str, Any]:
    """Returns the tensors after two steps with gradients of zero: only weight decay acts."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        engine = make(dtype)
        case = Case(dtype, full=True)
        model = prepared(engine, case, replace(SETTINGS, loss_scale=1.0))
        batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
        for rate in (0.5, 0.25):
            with engine.autocast():
                engine.backward(model.loss(batch) * 0)
            engine.step(rate)
        found[str(dtype)] = engine.trained_tensors()
    return found


def _errors(make: Any) -> dict[str, str]:
    found = {}
    for name, dtype, scale in (
        ("nan", torch.float32, 1.0),
        ("nan-bf16", torch.bfloat16, 1.0),
        ("overflow", torch.float16, 2.0**-18),
    ):
        engine = make(dtype)
        model = prepared(engine, Case(dtype), replace(SETTINGS, loss_scale=scale))
        batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
        try:
            for _ in range(5):
                engine.backward(model.loss(batch) * math.inf)
                engine.step(0.1)
        except RunError as error:
            found[name] = str(error)
    engine = make(torch.float32)
    prepared(engine, RUNS["delta"])
    state = engine.training_state()
    state["tensors"].popitem()
    try:
        engine.load_training_state(state)
    except RunError as error:
        found["state"] = str(error)
    return found


def _idle_step(make: Any) -> list[float]:
    """Returns the norms of two steps; before the second there is no backward pass."""
    engine = make(torch.float32)
    model = prepared(engine, RUNS["full"])
    engine.backward(model.loss(collate(tiny.encode(RECORDS), tiny.TOKENIZER)))
    return [engine.step(0.1).grad_norm, engine.step(0.1).grad_norm]


def _memory(make: Any, bmt: Any, folder: Path) -> dict[str, int]:
    """Returns the bytes of this process's parts of a mapped model, and of the peak in loading."""
    with torch.device("meta"):
        model = CPMBee(tiny.make_config(**BIG))
    model.half()
    load_into(model, Checkpoint(folder / "big.bin").entries.items(), CPU)  # stays mapped
    delta.insert(model, delta.DeltaConfig(rank=1), seed=0)
    engine = make(torch.float32)
    plain, used = bmt.C.ncclAllGather, [tiny.anonymous_memory()]

    def gather(*values: int) -> None:  # called for each tensor
        plain(*values)
        used.append(tiny.anonymous_memory())

    bmt.C.ncclAllGather = gather
    engine.prepare(model, SETTINGS)
    bmt.C.ncclAllGather = plain
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return {"parts": sum(own.values()), "used": max(used) - used[0]}


BIG = {"dim_model": 256, "num_heads": 4, "dim_head": 64, "dim_ff": 1024, "num_layers": 12}


@contextlib.contextmanager
def freed_memory_leaves() -> Iterator[None]:
    """Have the allocator return at once what is freed, which takes time, so that it can be seen."""
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    assert libc.mallopt(threshold, 1 << 16)
    try:
        yield
    finally:
        libc.mallopt(threshold, 32 << 20)


def main(folder: Path) -> None:
    bmt, make = bmtrain_cpu.engines()
    world_size = make(torch.float32).world_size
    own = f"bmtrain-{world_size}"
    found: dict[str, Any] = {"runs": {}}
    with freed_memory_leaves():
        found["memory"] = _memory(make, bmt, folder)
    for name in RUNS if world_size == 1 else ON_TWO:
        engine, path = make(RUNS[name].dtype), state_path(folder, own, name)
        found["runs"][name] = train(engine, RUNS[name], path if name in RESUMED else None)
    make(torch.float32).barrier()  # the first rank has written the states
    found["resumed"] = _resume(make, folder)
    found["decay"] = _decay(make)
    found["errors"] = _errors(make)
    found["idle"] = _idle_step(make)
    found["reduced"] = [
        make(torch.float32).reduce([1.5, 2.0**40 + 1, make(torch.float32).rank]),
        make(torch.float32).reduce_max([3, -make(torch.float32).rank, 2**40 + 1]),
        make(torch.float32).reduce([]),
    ]
    found["traffic"] = _traffic(make, bmt)
    engine = make(torch.float32)
    torch.save(found, folder / f"found-{world_size}-{engine.rank}.pt")
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
