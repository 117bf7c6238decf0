"""Whether a run recomputes activations in the backward pass (`--checkpointing`)."""

from __future__ import annotations

import numpy as np
import torch

from cpm_bee.delta import DeltaConfig
from cpm_bee.engine.device import free_memory
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.memory_estimate import (
    CheckpointingChoice,
    TrainingSetup,
    batch_of_data,
    choose_checkpointing,
)
from cpm_bee.train.options import AUTO, Options


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
