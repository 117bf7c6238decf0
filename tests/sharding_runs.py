"""Run under torchrun by tests/engine/test_fsdp.py: each check raises if it fails."""

from __future__ import annotations

import copy
import ctypes
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpm_bee import delta
from cpm_bee.checkpoint.reader import LazyTensor, save_tensors
from cpm_bee.data.batch import collate
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.linear import FrozenLinear
from cpm_bee.model.layers import Linear, RMSNorm
from cpm_bee.pretrained import open_pretrained

RECORDS = [{"input": "春天 ab" * 3, "<ans>": "天"}, {"input": "x", "<ans>": {"a": "b", "x": ""}}]
SETTINGS = OptimizerSettings(0.1, 1.0, 8.0, 2.0, 3)
CPU = torch.device("cpu")
# 16.8 million parameters, 64 MiB in fp32; a first dimension that two do not divide.
LARGE = tiny.make_config(dim_model=512, num_heads=8, dim_head=64, dim_ff=1365, num_layers=5)


# Of each LoRA tensor that a layer has computed with.
LORA_TYPES: set[torch.dtype] = set()
_lora_of = FrozenLinear.lora_of


def recorded(linear: Linear) -> tuple[torch.Tensor, ...]:
    found = _lora_of(linear)
    LORA_TYPES.update(t.dtype for t in found)
    return found


FrozenLinear.lora_of = staticmethod(recorded)  # type: ignore[method-assign]


def write_model(folder: Path, config: ModelConfig) -> str:
    """Write a checkpoint in fp16, with its config and vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.make_model(0, **config.to_dict())
    save_tensors(folder / "model.bin", {n: p.half() for n, p in model.state_dict().items()})
    tiny.write_vocabulary(folder / "vocab.txt")
    return str(folder / "model.bin")


def open_model(path: str, config: Path, dtype: torch.dtype = torch.float32) -> Any:
    return open_pretrained(path, str(config), None, dtype)


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reading(engine: TorchEngine, folder: Path) -> None:
    """Assert that each rank reads only its own rows, and has memory for no more."""
    base = open_model(str(folder / "large" / "model.bin"), folder / "large" / "config.json")
    rows: dict[str, tuple[int, int, int]] = {}
    original = LazyTensor.rows

    def counted(entry: LazyTensor, begin: int, end: int) -> LazyTensor:
        found = original(entry, begin, end)
        name = next(name for name, other in entries.items() if other is entry)
        rows[name] = (begin, begin + found.shape[0], entry.shape[0])
        return found

    entries = dict(base.tensors())
    LazyTensor.rows = counted  # type: ignore[method-assign, assignment]
    base = replace(base, tensors=lambda: iter(entries.items()))
    engine.load_model(base, "fsdp", offload=False)
    whole = sum(4 * math.prod(entry.shape) for entry in entries.values())
    ctypes.CDLL(None).malloc_trim(
        0
    )  # or what was freed before, also by whom it was forked, is reused
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    base.model.requires_grad_(False)
    engine.prepare(base.model, SETTINGS)
    peak = memory("VmHWM") - before
    LazyTensor.rows = original  # type: ignore[method-assign]
    assert rows.keys() == entries.keys()
    for begin, end, count in rows.values():
        half = -(-count // 2)
        assert (begin, end) == ((0, half) if engine.rank == 0 else (half, count))
    assert 0.5 * whole < peak < 0.75 * whole, (peak / whole, whole)
    print(f"rank {engine.rank}: peak {peak / whole:.3f} of the model")


def run(engine: TorchEngine, folder: Path, way: str) -> dict[str, Any]:
    """Run steps, of which the first overflows; returns what the engine reports."""
    path, config = folder / "small" / "model.bin", folder / "small" / "config.json"
    base = open_model(str(path), config, engine.dtype)
    delta.insert(base.model, delta.DeltaConfig(rank=3, targets=("project_q", "w_out")), 0)
    engine.load_model(base, "ddp" if way == "ddp" else "fsdp", offload=way == "offload")
    engine.prepare(base.model, SETTINGS)
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    found: dict[str, Any] = {"results": []}
    for step in range(4):
        weight = math.inf if step == 0 and engine.rank == 0 else 0.1 + engine.rank
        with engine.autocast():
            loss = base.model.loss(batch) * weight / batch.num_targets
        engine.backward(loss)
        result = engine.step(0.05)
        found["results"].append((result.skipped, engine.loss_scale))
        if step:
            found[f"norm {step}"] = torch.tensor(result.grad_norm)
        if step == 2:
            found["state"] = copy.deepcopy(engine.training_state())
    for s in engine.statistics():
        found[s.name] = torch.tensor([s.mean, s.std, s.grad_norm])
        found["results"].append(s.shape)
    found |= {f"trained {name}": tensor for name, tensor in engine.trained_tensors().items()}
    return found


def spreading(engine: TorchEngine, folder: Path) -> None:
    """Assert that fp16 with its loss scale, skipped steps, statistics and states is the same."""
    kinds = {way: run(engine, folder, way) for way in ("ddp", "fsdp", "offload")}
    expected = kinds["ddp"]
    assert [r[0] for r in expected["results"][:4]] == [True, False, False, False]
    for way in ("fsdp", "offload"):
        found = kinds[way]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("trained") and engine.rank > 0:
                continue  # complete only on rank 0
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)
            elif name == "results":
                assert found[name] == value, (found[name], value)
    if engine.rank == 0:
        first, second = (kinds[way]["state"] for way in ("ddp", "fsdp"))
        assert first.keys() == second.keys()
        assert first["loss_scale"] == second["loss_scale"]
        for name, moments in first["optimizer"].items():
            assert moments.keys() == second["optimizer"][name].keys()
            for kind, value in moments.items():
                assert value.shape == second["optimizer"][name][kind].shape


class Uses(TorchDispatchMode):
    """Records the types of matrices at least as large as a layer's that are gathered or cast."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: set[torch.dtype] = set()
        self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "allgather" in name or "all_gather_into" in name:
            flat = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.gathered |= {t.dtype for t in flat}
        if func is torch.ops.aten._to_copy.default and args[0].shape in MATRICES:
            self.casts += 1
        return func(*args, **(kwargs or {}))


# Of the small model's layers; no activation has such a shape.
MATRICES = {p.shape for p in tiny.make_model(0).encoder.layers.parameters() if p.dim() == 2}
# No clipping: its norm is added up in another order, so that the last bit of a weight could differ.
UNCLIPPED = replace(SETTINGS, clip_grad=1e30)


def full_run(engine: TorchEngine, folder: Path, way: str, *, rounded: bool) -> dict[str, Any]:
    """Train all weights; returns losses and results.

    Args:
        rounded: round the layers' norm weights to the compute type in each pass, as FSDP does.
    """
    path, config = folder / "small" / "model.bin", folder / "small" / "config.json"
    base = open_model(str(path), config)
    engine.load_model(base, way, offload=False)
    if rounded:
        for module in base.model.encoder.layers.modules():
            if isinstance(module, RMSNorm):
                round_weight(module, engine.dtype)
    engine.prepare(base.model, UNCLIPPED)
    found: dict[str, torch.Tensor] = {}
    for step, record in enumerate(RECORDS):
        batch = collate(tiny.encode([record]), tiny.TOKENIZER)
        with Uses() as uses:
            with engine.autocast():
                loss = base.model.loss(batch) * (0.1 + engine.rank) / batch.num_targets
            engine.backward(loss)
        check_uses(uses, engine.dtype, way)
        found[f"loss {step}"] = loss.detach()
        # At rate 0 the weights stay the same in both ways, whatever the optimizer's rounding.
        assert not engine.step(0.0 if step == 0 else 0.01).skipped
        strategy = engine._strategy
        for name, p in base.model.named_parameters():
            assert p.grad is not None
            gradient = strategy.whole(strategy.local(p.grad), p)
            if engine.rank == 0:  # complete only there
                found[f"gradient {step} of {name}"] = gradient
    trained = engine.trained_tensors()
    return found | (trained if engine.rank == 0 else {})


def round_weight(norm: RMSNorm, dtype: torch.dtype) -> None:
    forward = norm.forward

    def rounding(x: torch.Tensor) -> torch.Tensor:
        weight = norm.weight
        del norm._parameters["weight"]
        norm.weight = weight.to(dtype)  # type: ignore[assignment]
        try:
            return forward(x)
        finally:
            del norm.weight
            norm.weight = weight

    norm.forward = rounding  # type: ignore[method-assign]


def check_uses(uses: Uses, dtype: torch.dtype, way: str) -> None:
    if way == "ddp":
        assert uses.casts == 0 if dtype == torch.float32 else uses.casts > 0
    else:
        assert uses.gathered == {dtype, torch.float32}  # fp32: what is outside the layers
        assert uses.casts == 0


def in_full(engine: TorchEngine, folder: Path) -> None:
    """Assert that the gradients of all weights are the same, apart from the norm weights' rounding.

    In fp32 there is none; elsewhere a run without FSDP is made to round them too. Two numbers have
    one sum in any order, so on two processes nothing else may differ, not in one bit. The
    optimizer's kernel may round its last bit in another way, as it gets tensors of other sizes.
    """
    before = engine.dtype
    for engine.dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = full_run(engine, folder, "ddp", rounded=engine.dtype != torch.float32)
        found = full_run(engine, folder, "fsdp", rounded=False)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32, name
            if name.startswith(("loss", "gradient")):
                assert torch.equal(found[name], value), (engine.dtype, name)
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
    engine.dtype = before


if __name__ == "__main__":
    place, one = Path(sys.argv[1]), TorchEngine(CPU, torch.float16)
    spreading(one, place)
    assert list(LORA_TYPES) == [torch.float32]
    in_full(one, place)
    reading(one, place)
    one.barrier()
    one.close()
    if one.rank == 0:
        print("all checks passed")
