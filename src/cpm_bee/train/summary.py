"""The lines that tell people what a run is, at its start or, in a dry run, instead of it."""

from __future__ import annotations

import os

import torch
from torch import nn

from cpm_bee.quantize.linear import num_weights
from cpm_bee.train.data_size import DataSize
from cpm_bee.train.memory_estimate import CheckpointingChoice
from cpm_bee.train.options import Options

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
    """Of a model that no engine has divided between processes yet."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"model with {num_weights(model):,} parameters, {trained:,} of them trained"


def data_lines(kind: str, size: DataSize, max_length: int, *, about: str = "") -> list[str]:
    """How many records are used, and a warning of those that are not.

    Args:
        kind: "training" or "evaluation".
        about: "about " where the size is an estimate.
    """
    lines = [f"{kind}: {about}{size.num_records} records"]
    if size.num_too_long:
        share = size.num_too_long / (size.num_records + size.num_too_long)
        lines.append(
            f"warning: {about}{size.num_too_long} {kind} records ({share:.2%}) are longer than "
            f"--max-length {max_length} and left out"
        )
    return lines


def schedule_warning(options: Options, min_steps: int) -> list[str]:
    """Tell where the learning rate comes to 0 before the run ends."""
    if options.lr_decay_style not in ("linear", "cosine"):
        return []
    steps = options.epoch * min_steps
    last = options.start_step + min(steps, options.max_steps or steps)
    if last <= options.schedule_end:
        return []
    return [
        f"warning: the {options.lr_decay_style} schedule reaches rate 0 at step "
        f"{options.schedule_end} (--train-iters), the run goes on to step {last} or more"
    ]


def checkpointing_line(choice: CheckpointingChoice) -> str:
    return f"checkpointing {'full' if choice.checkpointing else 'none'}: {choice.reason}"
