"""Whether a run recomputes activations in the backward pass (`--checkpointing`)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cpm_bee.data.batch import Batch
from cpm_bee.delta import DeltaConfig
from cpm_bee.engine.device import free_memory
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.memory_estimate import (
    TrainingSetup,
    batch_of_data,
    estimate,
    upper_bound,
)
from cpm_bee.train.options import AUTO, Options
from cpm_bee.train.sharded_estimate import estimate_sharded

# Allows for fragmentation and for memory inside kernels.
MARGIN = 1.2
_GIB = 2**30


class CheckpointingChoice(NamedTuple):
    checkpointing: bool
    reason: str  # with the figures


def choose_for_run(
    options: Options,
    config: ModelConfig,
    delta_config: DeltaConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    lengths: np.ndarray,
    num_targets: np.ndarray,
    *,
    num_processes: int,
    is_sharded: bool,
) -> CheckpointingChoice:
    """Choose, as far as this process can tell; auto predicts the memory of a step.

    Args:
        lengths, num_targets: of the training records, [R]; at least one fits into a row.
        is_sharded: the processes divide weights, gradients and moments between them.
    """
    if options.checkpointing != AUTO:
        return CheckpointingChoice(options.checkpointing == "full", "as requested")
    rows = options.batch_size * options.max_length
    tokens = min(rows, options.max_tokens or rows)
    batch = batch_of_data(lengths, num_targets, options.max_length, tokens, config.vocab_size)
    training = TrainingSetup(dtype, delta_config, options.quantize)
    available = free_memory(device, num_processes)
    shards = num_processes if is_sharded else 1
    return choose_checkpointing(config, training, batch, available, shards)


def choose_checkpointing(
    config: ModelConfig, training: TrainingSetup, batch: Batch, available: int, shards: int = 1
) -> CheckpointingChoice:
    """Choose activation checkpointing unless the predicted peak fits `available` with a margin.

    Args:
        shards: the number of processes that weights, gradients and moments are divided between.
    """
    most = upper_bound(config, training, batch, shards)
    if most * MARGIN <= available:
        return CheckpointingChoice(
            False, f"a step needs less than {_gib(most)} of {_gib(available)}"
        )

    def peak(checkpointing: bool) -> int:
        setup = replace(training, checkpointing=checkpointing)
        if shards > 1:
            return estimate_sharded(config, setup, batch, shards).peak
        return estimate(config, setup, batch).peak

    without = peak(False)
    if without * MARGIN <= available:
        return CheckpointingChoice(
            False, f"a step needs about {_gib(without)} of {_gib(available)}"
        )
    reason = f"a step needs about {_gib(peak(True))}, without it {_gib(without)}"
    return CheckpointingChoice(True, f"{reason}, of {_gib(available)}")


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
