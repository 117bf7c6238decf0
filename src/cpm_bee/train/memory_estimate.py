"""Peak memory of a training step, predicted by running the step on tensors without values.

The step is the real one: `CPMBee.loss`, its backward pass, the torch engine's clipping and AdamW.
The weights are PyTorch's fake tensors. The batch is real, so that what depends on its values (which
records are grouped) is the same as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cpm_bee import quantize as quantization
from cpm_bee.checkpoint.loading import set_parameter
from cpm_bee.data.batch import Batch
from cpm_bee.delta import DeltaConfig
from cpm_bee.delta import insert as insert_delta
from cpm_bee.engine.adamw import AdamW
from cpm_bee.engine.clip import clip_by_global_norm
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS, Format
from cpm_bee.quantize.linear import insert_quantized_linears
from cpm_bee.train.live_storages import LiveStorages

_SEGMENTS = 8  # per record of `typical_batch`; does not affect memory


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    Attributes:
        dtype: the compute type.
        held: the type of the weights; None: `dtype` under a delta, else fp32.
    """

    dtype: torch.dtype
    delta: DeltaConfig | None = None
    quantize: str = quantization.NONE
    checkpointing: bool = False
    held: torch.dtype | None = None


class MemoryEstimate(NamedTuple):
    """Numbers of bytes. `rest` is what a step holds at its peak besides the other three."""

    weights: int
    gradients: int
    moments: int
    rest: int  # activations and temporaries; with FSDP also what is gathered

    @property
    def peak(self) -> int:
        return sum(self)


def estimate(config: ModelConfig, training: TrainingSetup, batch: Batch) -> MemoryEstimate:
    """Estimates the peak of a training step on one process without sharding.

    Imports PyTorch's fake tensors, which takes seconds and 75 MiB. The estimate excludes memory
    inside kernels, fragmentation, and what a process always needs (on a GPU about 0.5 GiB).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = meta_model(config, training)

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        with fake:
            return torch.empty(shape, dtype=dtype, device="cpu")

    with LiveStorages(fake) as live:
        set_parameters(model, training, make)
        weights = live.live
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = AdamW(trained, weight_decay=0.01)
        moments = live.live - weights
        for p in trained.values():
            p.grad = torch.zeros_like(p)  # of the last step: the engine keeps them until now
        gradients = live.live - weights - moments
        with torch.autocast("cpu", training.dtype, enabled=training.dtype != torch.float32):
            loss = model.loss(batch)
        for p in trained.values():
            p.grad = None
        (loss / batch.num_targets).backward()
        del loss
        found = {name: p.grad for name, p in trained.items() if p.grad is not None}
        clip_by_global_norm(list(found.values()), 1.0)
        optimizer.step(trained, found, 1e-3)
    return MemoryEstimate(weights, gradients, moments, live.peak - weights - gradients - moments)


def meta_model(config: ModelConfig, training: TrainingSetup) -> CPMBee:
    """Returns the model to train, without values; `set_parameters` gives it some."""
    with torch.device("meta"):
        model = CPMBee(config)
    if training.quantize != quantization.NONE:
        insert_quantized_linears(model, _opaque(FORMATS[training.quantize]))
    if training.delta is not None:
        insert_delta(model, training.delta, seed=0)
    model.encoder.set_checkpointing(training.checkpointing)
    return model.train()


def set_parameters(
    model: nn.Module,
    training: TrainingSetup,
    make: Callable[[torch.Size, torch.dtype], torch.Tensor],
) -> None:
    """Replace the parameters of a model, or a part, with `make`'s, of the types of training."""
    held = training.held or (torch.float32 if training.delta is None else training.dtype)
    for name, p in list(model.named_parameters()):
        keeps_type = name.endswith((".codes", ".absmax", ".lora_A", ".lora_B"))
        set_parameter(model, name, make(p.shape, p.dtype if keeps_type else held))


def _opaque(base: Format) -> Format:
    """Returns a format whose `dense` has no temporaries, like a GPU kernel."""

    def dense(
        self: Format, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return codes.new_empty(len(codes), self.dim_in(codes), dtype=dtype)

    opaque: Format = type("Opaque", (type(base),), {"dense": dense})()
    return opaque


def typical_batch(
    lengths: Sequence[int],
    num_targets: int | Sequence[int],
    vocab_size: int,
    *,
    num_pairs: int = 0,
    as_generated: bool = False,
) -> Batch:
    """Returns a batch of records of given lengths, whose last tokens are targets.

    Args:
        num_targets: of each record, or the same for all.
        num_pairs: the number of extension entries.
        as_generated: include the candidates of generation, as in evaluation.
    """
    wanted = [num_targets] * len(lengths) if isinstance(num_targets, int) else num_targets
    counts = [min(pair) for pair in zip(wanted, lengths, strict=True)]
    record = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    until_end = ends[record] - torch.arange(len(record))
    positions = torch.nonzero(until_end <= torch.tensor(counts)[record]).squeeze(1)
    context = torch.ones(len(record), dtype=torch.bool).index_fill_(0, positions, False)
    pairs = torch.arange(num_pairs)
    assert len(positions) == sum(counts)
    return Batch(
        ids=torch.arange(len(record)) % vocab_size,
        subs=torch.zeros(len(record), dtype=torch.int64),
        segments=torch.arange(len(record)) % _SEGMENTS,
        context=context,
        lengths=tuple(lengths),
        num_segments=(_SEGMENTS,) * len(lengths),
        relations=torch.zeros(_SEGMENTS**2 * len(lengths), dtype=torch.uint8),
        target_positions=positions,
        targets=positions % vocab_size,
        target_records=record[positions],
        extension_ids=pairs % vocab_size,
        extension_subs=pairs + 1,
        unk_is_candidate=torch.ones(len(lengths), dtype=torch.bool) if as_generated else None,
        extension_is_candidate=torch.ones(len(lengths), num_pairs, dtype=torch.bool)
        if as_generated
        else None,
    )


def batch_of_data(
    lengths: np.ndarray, num_targets: np.ndarray, max_length: int, tokens: int, vocab_size: int
) -> Batch:
    """Returns a batch of about `tokens` tokens: the longest record, and others of mean length.

    Args:
        lengths, num_targets: of all records, [R].
        max_length: records longer than this are left out; at least one is not.
    """
    fitting = lengths <= max_length
    longest, mean = int(lengths[fitting].max()), max(1, round(float(lengths[fitting].mean())))
    tokens = min(tokens, int(lengths[fitting].sum(dtype=np.int64)))
    others = max(0, tokens - longest) // mean
    targets = max(1, round(float(num_targets[fitting].mean())))
    return typical_batch([longest, *[mean] * others], targets, vocab_size)


def upper_bound(config: ModelConfig, training: TrainingSetup, batch: Batch, shards: int = 1) -> int:
    """Returns an upper bound on the bytes of a training step, which takes no time to compute."""
    model = meta_model(config, training)
    static = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    if training.delta is None:
        static += sum(4 * p.numel() for p in model.parameters())  # copies made by autocast
    if shards > 1:
        static += sum(8 * p.numel() for p in model.parameters())  # gathered, in buffers and out
    inner = config.num_heads * config.dim_head
    a_token = 4 * (16 * config.dim_model + 12 * inner + 12 * config.dim_ff)
    pairs = 2 * sum((length / 0.8) ** 2 for length in batch.lengths)  # padded, and at targets
    kept = 3 * config.num_layers if training.delta is None else 3
    attention = pairs * (4 * config.num_heads * kept + 64)
    held = batch.num_targets if training.delta is None else min(batch.num_targets, 272)
    logits = 4 * 4 * held * config.vocab_size
    matrix = max(config.dim_model, inner) * max(config.dim_model, inner, config.dim_ff)
    temporary = 16 * matrix + 8 * config.dim_model * config.vocab_size * (training.delta is None)
    return round(
        static + batch.num_tokens * config.num_layers * a_token + attention + logits + temporary
    )
