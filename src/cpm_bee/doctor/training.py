"""Steps of `doctor.py --gpu`: training in each dtype, against double precision on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cpm_bee.data.batch import Batch
from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import Line, judge, judge_equal
from cpm_bee.doctor.child import Context
from cpm_bee.model.network import CPMBee

_STEPS = 3
_OVERFLOWING = 2.0**40  # a loss scale at which every gradient in fp16 is infinite
_MOST_SKIPPED = 60


def fp32(context: Context) -> None:
    """Losses, gradients, and what three steps change, with a LoRA and in full."""
    _compare(context, torch.float32)


def bf16(context: Context) -> None:
    _compare(context, torch.bfloat16)


def fp16(context: Context) -> None:
    _compare(context, torch.float16)
    _overflow(context)


def _batches() -> list[Batch]:
    return [workload.batch_of(workload.records(6, seed)) for seed in range(_STEPS)]


def _compare(context: Context, dtype: torch.dtype) -> None:
    config, batches = workload.make_config(context.device), _batches()
    if context.on_cpu:
        # The trusted computation runs on the CPU too: another order of the records makes the
        # tested one add in another order.
        tested = [workload.batch_of(workload.records(6, seed)[::-1]) for seed in range(_STEPS)]
    else:
        tested = batches
    for kind in ("LoRA", "in full"):
        model = workload.make_model(config, lora=kind == "LoRA")
        workload.hold(model, dtype)
        context.add(*_compared(kind, model, batches, tested, context.device, dtype))


def _compared(
    kind: str,
    model: CPMBee,
    batches: Sequence[Batch],
    tested: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Line]:
    exact = workload.train_exactly(model, batches)
    trusted = workload.train_trusted(model, batches, dtype)
    actual = workload.train(model, tested, device, dtype)
    return [
        judge(
            f"{kind}, {part}",
            getattr(actual, part),
            [getattr(t, part) for t in trusted],
            getattr(exact, part),
            dtype,
        )
        for part in ("losses", "gradients", "updates")
    ]


def _overflow(context: Context) -> None:
    """A loss scale that overflows is halved until the gradients are finite, then doubled again."""
    config = workload.make_config(context.device)
    model = workload.hold(workload.make_model(config, lora=True), torch.float16)
    settings = replace(workload.SETTINGS, loss_scale=_OVERFLOWING)
    batch = workload.batch_of(workload.records(6))
    first = workload.train(model, [batch], context.device, torch.float16, settings)
    before = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    context.check(
        "overflow is seen",
        first.results[0].skipped and first.scales[0] == _OVERFLOWING / 2,
        f"scale {_OVERFLOWING:.0e}: skipped {first.results[0].skipped}, then {first.scales[0]:.0e}",
    )
    unchanged = judge_equal("a skipped step changes nothing", first.weights, before)
    context.add(unchanged)
    run = workload.train(model, [batch] * _MOST_SKIPPED, context.device, torch.float16, settings)
    skipped = [result.skipped for result in run.results]
    good = skipped.index(False) if False in skipped else len(skipped)
    context.check("scale is found", 0 < good < len(skipped), f"after {good} skipped steps")
    grown = any(b > a for a, b in zip(run.scales[good:], run.scales[good + 1 :], strict=False))
    text = f"highest {max(run.scales[good:], default=0):.0e}"
    context.check("scale grows again", grown, text)
    finite = all(torch.isfinite(t).all() for t in run.weights.values())
    context.check("weights stay finite", finite, f"after {len(skipped)} steps")


def checkpointing(context: Context) -> None:
    """Recomputed activations give the same losses and gradients, dropout included."""
    config = workload.make_config(context.device)
    dtype = torch.float32 if context.on_cpu else torch.bfloat16
    batches = _batches()
    for kind in ("LoRA", "LoRA with dropout", "in full"):
        dropout = 0.1 if "dropout" in kind else 0.0
        model = workload.make_model(config, lora=kind != "in full", dropout=dropout)
        workload.hold(model, dtype)
        runs = {}
        for recompute in (False, True):
            model.encoder.set_checkpointing(recompute)
            runs[recompute] = workload.train(model, batches, context.device, dtype)
        for part in ("losses", "gradients"):
            kept, recomputed = (getattr(runs[r], part) for r in (False, True))
            # The same kernels on the same values: only their order of additions may differ.
            context.add(judge(f"{kind}, {part}", recomputed, [kept], kept, dtype))
    if context.on_cpu:
        context.needs_cuda("less memory")
        return
    peaks = [_peak(context, r) for r in (False, True)]
    text = f"{peaks[0] / 2**20:.0f} MiB, recomputed {peaks[1] / 2**20:.0f} MiB"
    context.check("less memory", peaks[1] < peaks[0], text)


def _peak(context: Context, recompute: bool) -> int:
    config = replace(workload.make_config(context.device), num_layers=8)
    model = workload.hold(workload.make_model(config, lora=True), torch.bfloat16)
    model.encoder.set_checkpointing(recompute)
    batch = workload.batch_of(workload.records(64))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(context.device)
    workload.train(model, [batch], context.device, torch.bfloat16)
    return torch.cuda.max_memory_allocated(context.device)
