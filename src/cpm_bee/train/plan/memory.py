"""The memory of a run: on the host, and on a GPU, of each process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cpm_bee import quantize
from cpm_bee.data.batch import Batch
from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.activation_checkpointing import MARGIN
from cpm_bee.train.data_size import DataSurvey, StepShape
from cpm_bee.train.memory_estimate import TrainingSetup
from cpm_bee.train.plan.batches import PlannedBatches
from cpm_bee.train.plan.sharded import simulate_sharded
from cpm_bee.train.plan.simulation import Peaks, Workload, simulate

CARDS = (8, 12, 16, 24, 40, 80)  # GB of GPUs
GIB = 2**30
# Taken for granted, not measured: what the driver, cuBLAS and NCCL hold beside tensors.
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Situation:
    """What determines the memory of one process.

    Attributes:
        shards: the processes that divide the model (FSDP); 1: each has the whole model.
        max_tokens: of a micro-batch, as `--max-tokens`.
    """

    config: ModelConfig
    dtype: torch.dtype
    delta: DeltaConfig | None
    quantize: str
    checkpointing: bool
    training: DataSurvey
    evaluation: DataSurvey | None
    rows: int  # of one process
    accumulate: int
    processes: int
    shards: int
    max_length: int
    max_tokens: int | None
    seed: int
    max_steps: int | None = None

    @property
    def setup(self) -> TrainingSetup:
        return TrainingSetup(self.dtype, self.delta, self.quantize, self.checkpointing)

    def batches(self, *, evaluation: bool = False) -> PlannedBatches:
        """Raises `InputError` if no record is short enough."""
        survey = self.evaluation if evaluation else self.training
        assert survey is not None
        if not (survey.lengths <= self.max_length).any():
            raise InputError(f"none of the first records fits into --max-length {self.max_length}")
        accumulate = 1 if evaluation else self.accumulate
        shape = StepShape(
            self.rows * self.processes * accumulate,
            self.max_length,
            shuffle_seed=None if evaluation else self.seed,
        )
        return PlannedBatches.of(
            survey,
            shape,
            self.config.vocab_size,
            processes=self.processes,
            accumulate=accumulate,
            max_tokens=self.max_tokens,
            max_steps=None if evaluation else self.max_steps,
            as_generated=evaluation,
        )

    def workload(self, most: int = 4) -> Workload:
        evaluation: list[Batch] = []
        if self.evaluation is not None:
            steps = self.batches(evaluation=True).heaviest(most)
            evaluation = [batch for step in steps for batch in step]
        return Workload(self.batches().heaviest(most), evaluation)


def on_host(situation: Situation) -> Peaks:
    """The tensors of a process that trains on the CPU."""
    return _simulated(situation, situation.workload(), on_gpu=False)


def on_gpu(situation: Situation) -> Peaks:
    """The tensors on the GPU of a process, predicted; nothing here was measured on a GPU."""
    return _simulated(situation, situation.workload(2), on_gpu=True)


def _simulated(situation: Situation, work: Workload, on_gpu: bool) -> Peaks:
    config, setup, shards = situation.config, situation.setup, situation.shards
    if shards > 1:
        return simulate_sharded(config, setup, work, shards, on_gpu=on_gpu)
    return simulate(config, setup, work, on_gpu=on_gpu)


def fits(peak: int, card: int) -> bool:
    """Whether a card of so many GB has room, with the margin of `--checkpointing auto`."""
    return peak * MARGIN + CONTEXT <= card * GIB


def for_gpu(situation: Situation) -> Situation:
    """The same on a GPU, where auto is bf16."""
    dtype = torch.bfloat16 if situation.dtype == torch.float32 else situation.dtype
    return replace(situation, dtype=dtype)


def quantizable(situation: Situation) -> bool:
    """Whether the base is not quantized yet, and can be."""
    config = situation.config
    widths = (config.dim_model, config.num_heads * config.dim_head, config.dim_ff)
    return situation.quantize == quantize.NONE and all(w % 64 == 0 for w in widths)
