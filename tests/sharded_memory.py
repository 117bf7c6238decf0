"""Run by tests/train/test_sharded_estimate.py: what rank 0 of two allocates with FSDP.

There is one process. Its collectives go to PyTorch's fake process group, which does not send
anything; values that another rank would send are replaced by this rank's own, so that they are
finite. Gloo would add copies of its own, which NCCL does not make. All allocations are counted, by
PyTorch's profiler.

Prints the largest number of bytes in use at a time, by case and phase: two steps, an
evaluation, and saving.
"""

from __future__ import annotations

import gc
import json
import os
import types
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpm_bee import delta
from cpm_bee.checkpoint.reader import LazyTensor
from cpm_bee.data.batch import Batch
from cpm_bee.distributed import process_group
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen import buffers
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.train.memory_estimate import TrainingSetup, typical_batch
from cpm_bee.train.plan.simulation import EVALUATION, SAVING, STEP

# 20 MiB of embedding and 5 MiB a layer in fp32: more than activations, so that each is seen.
CONFIG = ModelConfig(
    vocab_size=20_000, dim_model=256, num_heads=4, dim_head=64, dim_ff=1400, num_layers=4
)
BATCH = typical_batch([40, 20], 8, CONFIG.vocab_size)
BATCHES = {"few targets": BATCH, "many targets": typical_batch([400, 300], 100, CONFIG.vocab_size)}
EVALUATION_BATCH = typical_batch([400, 300], 100, CONFIG.vocab_size, as_generated=True)
FULL = TrainingSetup(torch.float32)
LORA = TrainingSetup(torch.float32, delta.DeltaConfig())
CASES = {
    "full": FULL,
    "full, bf16": replace(FULL, dtype=torch.bfloat16),
    "LoRA": LORA,
    "LoRA, bf16": replace(LORA, dtype=torch.bfloat16),
}
SHARDS = 2


def gather(output_tensor: torch.Tensor, input_tensor: torch.Tensor, **_: Any) -> None:
    output_tensor.view(SHARDS, -1).copy_(input_tensor.flatten())


def scatter(output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
    output.copy_(input.view(SHARDS, -1)[0])


def join(device: torch.device) -> None:
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=SHARDS)
    dist.all_gather_into_tensor = gather  # type: ignore[assignment]
    dist.reduce_scatter_tensor = scatter  # type: ignore[assignment]


def meta_model(training: TrainingSetup) -> CPMBee:
    with torch.device("meta"):
        model = CPMBee(CONFIG)
    if training.delta is not None:
        delta.insert(model, training.delta, 0)
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(training.dtype)
    model.encoder.set_checkpointing(training.checkpointing)
    return model


def evaluate(engine: TorchEngine, model: CPMBee) -> None:
    model.eval()
    with torch.no_grad(), engine.autocast():
        model.score(EVALUATION_BATCH)
    model.train()


def peaks(training: TrainingSetup, batch: Batch) -> dict[str, int]:
    gc.collect()  # of the case before: what is freed below would be counted
    engine = TorchEngine(torch.device("cpu"), training.dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = meta_model(training)
        whole = initial_values(meta_model(FULL), 0)
        base: Any = types.SimpleNamespace(
            model=model, tensors=lambda: ((name, LazyTensor.of(value)) for name, value in whole)
        )
        engine.load_model(base, "fsdp", offload=False)
        engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
        gc.collect()
        with torch.profiler.record_function(STEP):
            for _ in range(2):
                with engine.autocast():
                    loss = model.loss(batch)
                engine.backward(loss / batch.num_targets)
                del loss
                engine.step(1e-3)
        with torch.profiler.record_function(EVALUATION):
            evaluate(engine, model)
        with torch.profiler.record_function(SAVING):
            engine.training_state()
    events = profiler.profiler.kineto_results.events()
    begins = {e.name(): e.start_ns() for e in events if e.name() in (STEP, EVALUATION, SAVING)}
    used, phase = 0, ""
    found = dict.fromkeys(begins, 0)
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() in begins:
            phase = event.name()
            found[phase] = used
        if event.name() == "[memory]":
            used += event.nbytes()
            if phase:
                found[phase] = max(found[phase], used)
    return found


def main() -> None:
    buffers._use_count = None  # turns off the buffer pool, as in the prediction
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(SHARDS)}
    process_group.join = join
    found = {
        f"{name}, {kind}": peaks(training, batch)
        for name, training in CASES.items()
        for kind, batch in BATCHES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
