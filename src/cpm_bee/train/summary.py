"""Lines that describe a run to people, at its start or in a dry run."""

from __future__ import annotations

import math
import os

import torch
from torch import nn

from cpm_bee.quantize.linear import num_weights
from cpm_bee.train.activation_checkpointing import CheckpointingChoice
from cpm_bee.train.data_size import DataSize
from cpm_bee.train.options import Options
from cpm_bee.train.schedules import EXPONENTIAL_DECAY, learning_rate

KINDS = {"--dataset": "training", "--eval-dataset": "evaluation"}


def engine_line(
    name: str, num_processes: int, device: torch.device, dtype: torch.dtype, loss_scale: float
) -> str:
    scale = loss_scale if dtype == torch.float16 else "not needed"
    return (
        f"engine {name}, {num_processes} process(es) on {device.type}, "
        f"{str(dtype).removeprefix('torch.')}, loss scale {scale}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    )


def model_line(model: nn.Module) -> str:
    """Describes the size of a model, before an engine divides it between processes."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"model with {num_weights(model):,} parameters, {trained:,} of them trained"


def data_lines(kind: str, size: DataSize, max_length: int, *, about: str = "") -> list[str]:
    """Returns how many records are used, and warnings about those that are not.

    Args:
        kind: "training" or "evaluation".
        about: "about " if the size is an estimate.
    """
    lines = [f"{kind}: {about}{size.num_records} records"]
    lines += _in_context_lines(size, max_length, about)
    if size.num_unanswered:
        lines.append(
            f'warning: {about}{size.num_unanswered} {kind} records have no answer ("<ans>" is '
            "empty) and are left out"
        )
    if size.num_too_long:
        share = size.num_too_long / (size.num_records + size.num_too_long)
        lines.append(
            f"warning: {about}{size.num_too_long} {kind} records ({share:.2%}) are longer than "
            f"--max-length {max_length} and left out"
        )
    if size.num_unwritable:
        lines.append(
            f"warning: {size.num_unwritable} {kind} records have an answer that can never be "
            "generated: the vocabulary lacks some of its characters, and exact match counts it as "
            "wrong"
        )
    return lines


def _in_context_lines(size: DataSize, max_length: int, about: str) -> list[str]:
    if not size.in_context:
        return []
    counts = ", ".join(f"{n} with {k}" for k, n in enumerate(size.in_context, start=1))
    lines = [f"in-context samples of the first epoch: {about}{counts}"]
    if size.num_shortened:
        lines.append(
            f"{about}{size.num_shortened} records have fewer than were drawn, as more do not fit "
            f"into --max-length {max_length}"
        )
    return lines


def schedule_warnings(options: Options, min_steps: int) -> list[str]:
    """Returns a warning about a run that cannot learn, or stops learning before its end.

    Args:
        min_steps: the steps of an epoch; there may be one or two more.
    """
    planned = options.epoch * min_steps
    steps = min(planned, options.max_steps or planned)
    first, last = options.start_step, options.start_step + steps  # the last step is last - 1
    warmup, end, style = options.warmup_iters, options.schedule_end, options.lr_decay_style
    change = "use a larger --epoch, a smaller --batch-size or a smaller --warmup-iters"
    if last <= warmup:
        peak = learning_rate(style, options.lr, last - 1, warmup, end)
        return [
            f"warning: the whole run of about {steps} step(s) is within the warm-up "
            f"(--warmup-iters {warmup}): the learning rate reaches only {peak:.1e}, for "
            f"--lr {options.lr:g}; {change}"
        ]
    rates = (learning_rate(style, options.lr, step, warmup, end) for step in range(first, last))
    if not any(rates):
        return [
            f"warning: the learning rate is 0 in all of the about {steps} step(s) of this run, so "
            f"it learns nothing; {change}, or another --start-step or --train-iters"
        ]
    if style in ("linear", "cosine") and last > end:
        return [
            f"warning: the {style} schedule reaches rate 0 at step {end} (--train-iters), but the "
            f"run continues to step {last} or more"
        ]
    if style == "exponential" and (reached := _negligible_after(warmup)) < last:
        return [
            f"warning: the exponential schedule is below a thousandth of --lr from step {reached} "
            f"on, but the run continues to step {last} or more"
        ]
    return []


def _negligible_after(warmup: int) -> int:
    """Returns the first step at which the exponential schedule is below --lr / 1000."""
    return warmup + math.ceil(math.log(1e-3) / math.log(EXPONENTIAL_DECAY))


def checkpointing_line(choice: CheckpointingChoice) -> str:
    return f"checkpointing {'full' if choice.checkpointing else 'none'}: {choice.reason}"
