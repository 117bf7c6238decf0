"""A plan as lines for a terminal."""

from __future__ import annotations

from cpm_bee.disk import shown_bytes
from cpm_bee.train.plan.result import Card, RunPlan
from cpm_bee.train.plan.simulation import Peaks
from cpm_bee.train.plan.times import duration

_GIB, _MIB = 2**30, 2**20


def lines_of(plan: RunPlan) -> list[str]:
    """Returns the lines; all sizes are of one process."""
    lines = [
        "plan: predicted from the real step on tensors without values, and from parts that were "
        "measured here"
    ]
    if plan.host is not None:
        lines += _host(plan, plan.host)
    else:
        lines.append(f"host memory of a process: {size(plan.host_peak)} beside the GPU")
    lines.append(
        f"GPU memory of a process, in 16 bit (never measured on a GPU): {_parts(plan.gpu)}"
    )
    lines += [_card(card) for card in plan.cards]
    lines += _time(plan)
    lines += _disk(plan)
    return lines


def size(count: float) -> str:
    """A number of bytes in MiB or GiB: `512 MiB`, `1.25 GiB`."""
    return f"{count / _MIB:,.0f} MiB" if count < _GIB else f"{count / _GIB:.2f} GiB"


def _parts(held: Peaks) -> str:
    return (
        f"{size(held.peak)}, in the {held.worst}: weights {size(held.weights)}, gradients "
        f"{size(held.gradients)}, moments {size(held.moments)}, activations, logits and buffers "
        f"{size(held.rest)}"
    )


def _host(plan: RunPlan, host: Peaks) -> list[str]:
    phases = ", ".join(f"{name} {size(peak)}" for name, peak in host.phases.items())
    own = plan.measured
    return [
        f"host memory of a process: {size(plan.host_peak)} resident at the peak: "
        f"{size(own.anonymous + own.mapped)} of the process itself (measured; {size(own.mapped)} "
        f"of it are pages of files) and {size(host.peak)} of tensors",
        f"  tensors: {_parts(host)}",
        f"  most in each phase: {phases}",
    ]


def _card(card: Card) -> str:
    if card.peak is not None:
        return f"  {card.gigabytes} GB: fits ({size(card.peak)})"
    if not card.fixes:
        return f"  {card.gigabytes} GB: does not fit, whatever flags are changed"
    ways = "; or ".join(f"{fix.flags} ({size(fix.peak)}; {fix.effect})" for fix in card.fixes)
    return f"  {card.gigabytes} GB: does not fit; it does with {ways}"


def _time(plan: RunPlan) -> list[str]:
    about = f"steps: about {plan.steps} of {plan.step_tokens:,.0f} tokens a process"
    time = plan.time
    if time is None:
        return [about, f"time: not measured, {plan.measured.reason}"]
    lines = [
        f"{about}, {duration(time.step)} each ({duration(time.step_cpu)} of CPU time)",
        f"time: about {duration(time.total)} in all, as busy as this machine is now: start "
        f"{duration(time.start)}, loading {duration(time.loading)}, training "
        f"{duration(time.training)}, evaluation {duration(time.evaluation)}, saving "
        f"{duration(time.saving)}",
    ]
    if plan.processes > 1:
        lines.append("  one process was measured: what several wait for each other is not included")
    return lines


def _disk(plan: RunPlan) -> list[str]:
    disk = plan.disk
    room = "enough" if disk.results <= disk.free else "too little"
    lines = [
        f"disk: {shown_bytes(disk.results)} of results (weights {shown_bytes(disk.weights)}, "
        f"states {shown_bytes(disk.states)}, a file that is being replaced "
        f"{shown_bytes(disk.replaced)}); {shown_bytes(disk.free)} are free, {room}"
    ]
    if disk.quantized:
        lines.append(f"  beside the checkpoint, once: {shown_bytes(disk.quantized)} (--quantize)")
    if disk.token_index:
        lines.append(f"  beside the data, once: {shown_bytes(disk.token_index)} of token index")
    return lines
