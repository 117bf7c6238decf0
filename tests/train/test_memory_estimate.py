"""The predicted peak against what is known, and the choice that follows from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import buffers
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.train import memory_estimate
from cpm_bee.train.activation_checkpointing import CheckpointingChoice, choose_checkpointing
from cpm_bee.train.live_storages import LiveStorages
from cpm_bee.train.memory_estimate import (
    TrainingSetup,
    estimate,
    typical_batch,
)
from cpm_bee.train.sharded_estimate import estimate_sharded

CONFIG = ModelConfig(
    vocab_size=2000, dim_model=128, num_heads=4, dim_head=32, dim_ff=192, num_layers=4
)
BATCH = typical_batch([40, 20, 30], 5, CONFIG.vocab_size)
LORA = TrainingSetup(torch.float32, delta.DeltaConfig())
FULL = TrainingSetup(torch.float32)


def real_rest(config: ModelConfig, training: TrainingSetup, batch: Batch) -> int:
    """Bytes of tensors alive beside the weights at the worst moment of a real backward pass."""
    with LiveStorages() as live:
        model = CPMBee(config)
        model.load_state_dict(dict(initial_values(model, 0)))
        if training.delta is not None:
            delta.insert(model, training.delta, 0)
        model.encoder.set_checkpointing(training.checkpointing)
        weights = live.peak = live.live
        model.loss(batch).backward()
    assert weights >= sum(p.nbytes for p in model.parameters())
    return live.peak - weights


@pytest.mark.parametrize("training", [LORA, replace(LORA, checkpointing=True), FULL], ids=str)
def test_the_rest_is_that_of_a_real_step(
    training: TrainingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors take what real ones take; a real step has no gradients from before it."""
    monkeypatch.setattr(buffers, "_use_count", None)  # what it keeps for later is not predicted
    found = estimate(CONFIG, training, BATCH)
    real = real_rest(CONFIG, training, BATCH)
    assert found.rest <= real <= found.rest + found.gradients
    assert real > 1 << 19


def test_parts() -> None:
    numbers = {n: p.numel() for n, p in CPMBee(CONFIG).named_parameters()}
    total = sum(numbers.values())
    full = estimate(CONFIG, FULL, BATCH)
    assert (full.weights, full.gradients) == (4 * total, 4 * total)
    assert full.moments == pytest.approx(8 * total, rel=0.001)  # and the step counts
    rank, inner = 8, CONFIG.num_heads * CONFIG.dim_head
    lora = 2 * CONFIG.num_layers * rank * (CONFIG.dim_model + inner)
    bf16 = estimate(CONFIG, replace(LORA, dtype=torch.bfloat16), BATCH)
    assert (bf16.weights, bf16.gradients) == (2 * total + 4 * lora, 4 * lora)
    nf4 = estimate(CONFIG, replace(LORA, quantize="nf4"), BATCH)
    linears = sum(n for name, n in numbers.items() if "encoder" in name and "norm" not in name)
    assert nf4.weights == 4 * (total - linears + lora) + linears // 2 + linears // 64 * 4


@pytest.mark.slow
def test_what_saves_memory_is_predicted_to() -> None:
    usual = estimate(CONFIG, LORA, BATCH)
    assert estimate(CONFIG, replace(LORA, checkpointing=True), BATCH).rest < usual.rest
    assert estimate(CONFIG, FULL, BATCH).peak > 2 * usual.peak
    smaller = estimate(CONFIG, LORA, typical_batch([10], 2, CONFIG.vocab_size))
    assert smaller.rest < usual.rest and smaller.weights == usual.weights
    masks = ((True, False), (False, False), (False, True), (True, True))
    pruned = estimate(replace(CONFIG, mask_modules=masks), LORA, BATCH)
    assert pruned.rest < usual.rest and pruned.weights < usual.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[89] * 6, [300], [7]], ids=str)
def test_the_bound_is_one(dtype: torch.dtype, lengths: list[int]) -> None:
    config = replace(CONFIG, num_layers=2)
    batch = typical_batch(lengths, 7, config.vocab_size)
    dropout = delta.DeltaConfig(dropout=0.1, targets=delta.TARGETS)
    for training in (LORA, FULL, replace(LORA, delta=dropout), replace(LORA, quantize="nf4")):
        training = replace(training, dtype=dtype)
        most = memory_estimate.upper_bound(config, training, batch)
        assert estimate(config, training, batch).peak < most
        if lengths == [7]:  # the worst case: what is gathered does not depend on the batch
            most = memory_estimate.upper_bound(config, training, batch, 2)
            assert estimate_sharded(config, training, batch, 2).peak < most


def test_a_typical_batch_is_one_that_records_could_make() -> None:
    batch = typical_batch([4, 2, 3], 3, vocab_size=50)
    assert batch.target_positions.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.target_records.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert (batch.num_tokens, batch.num_targets) == (9, 8)
    model = CPMBee(replace(CONFIG, vocab_size=50))
    model.load_state_dict(dict(initial_values(model, 0)))
    assert torch.isfinite(model.loss(batch))
    lengths, targets = np.array([10, 30, 5000, 20]), np.array([3, 1, 900, 2])
    data = memory_estimate.batch_of_data(lengths, targets, max_length=40, tokens=100, vocab_size=50)
    assert data.lengths == (30, 20)  # no more than there are
    data = memory_estimate.batch_of_data(lengths, targets, max_length=40, tokens=55, vocab_size=50)
    assert data.lengths == (30, 20) and data.num_targets == 2 * 2


@pytest.mark.slow
def test_choice() -> None:
    none, full = (
        estimate(CONFIG, LORA, BATCH),
        estimate(CONFIG, replace(LORA, checkpointing=True), BATCH),
    )

    def choose(available: float, shards: int = 1) -> CheckpointingChoice:
        return choose_checkpointing(CONFIG, LORA, BATCH, int(available), shards)

    assert choose(1 << 40) == CheckpointingChoice(
        False, f"a step needs less than {size()} of 1024.00 GiB"
    )
    assert not choose(1.21 * none.peak).checkpointing
    assert choose(1.19 * none.peak).checkpointing
    assert choose(0).reason == (
        f"a step needs about {full.peak / 2**30:.2f} GiB, without it {none.peak / 2**30:.2f} GiB, "
        "of 0.00 GiB"
    )
    sharded = estimate_sharded(CONFIG, LORA, BATCH, 4).peak
    assert not choose(1.21 * sharded, shards=4).checkpointing
    assert choose(1.19 * sharded, shards=4).checkpointing


def size() -> str:
    return f"{memory_estimate.upper_bound(CONFIG, LORA, BATCH) / 2**30:.2f} GiB"


class Casts(TorchDispatchMode):
    """Whether copies in another type were made of some tensors, and of how many others."""

    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self._watched = {t.untyped_storage().data_ptr() for t in watched}
        self.of_watched: list[tuple[int, ...]] = []
        self.of_others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._to_copy.default:
            if args[0].untyped_storage().data_ptr() in self._watched:
                self.of_watched.append(tuple(args[0].shape))
            else:
                self.of_others += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["by hand", "by PyTorch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_makes_no_copies_of_frozen_weights(checkpointing: bool, dropout: float) -> None:
    model = tiny.make_model(1)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    matrices = [p for p in model.encoder.parameters() if p.dim() == 2]
    matrices.append(model.input_embedding.weight)
    delta.insert(model, delta.DeltaConfig(dropout=dropout), 0)
    model.train().encoder.set_checkpointing(checkpointing)
    batch = collate(tiny.encode([{"input": "b<mask_0>", "<ans>": "a<mask_0>"}]), tiny.TOKENIZER)
    with Casts(matrices) as casts, torch.autocast("cpu", torch.bfloat16):
        model.loss(batch).backward()
    assert casts.of_watched == []
    assert casts.of_others > 0  # the LoRA is kept in fp32, so that there are casts to be seen
