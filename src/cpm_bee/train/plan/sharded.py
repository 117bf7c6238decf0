"""The tensors that a process holds in each phase of a run that is divided with FSDP2."""

from __future__ import annotations

from cpm_bee.model.config import ModelConfig
from cpm_bee.train.live_storages import LiveStorages
from cpm_bee.train.memory_estimate import TrainingSetup
from cpm_bee.train.plan.simulation import (
    EVALUATION,
    SAVING,
    STEP,
    Peaks,
    Workload,
    simulated_pool,
)
from cpm_bee.train.sharded_estimate import ShardedModel


def simulate_sharded(
    config: ModelConfig,
    training: TrainingSetup,
    work: Workload,
    shards: int,
    *,
    on_gpu: bool = False,
) -> Peaks:
    """Simulate a run of the process with the most to hold: rank 0, which has copies of all trained
    tensors while it saves.

    Args:
        on_gpu: count what is on the GPU; see `simulate`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ShardedModel(config, training, shards)
    own = model.weights + model.gradients + model.moments
    phases: dict[str, int] = {}

    def note(phase: str, rest: int) -> None:
        phases[phase] = max(phases.get(phase, 0), own + rest)

    def evaluate() -> None:
        for batch in work.evaluation:
            note(EVALUATION, model.evaluate(batch))

    def save() -> None:
        # What is outside the layers stays gathered after an evaluation. Both moments are copied,
        # then the weights; each is gathered first.
        gathered = model.root if work.evaluation else 0
        copies = 2 * model.trained + max(model.trained, 2 * model.largest)
        note(SAVING, model.kept + gathered + copies)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with LiveStorages(fake) as live, simulated_pool(on_gpu):
        model.begin(live, fake)
        evaluate()
        for step in work.steps:
            for batch in step:
                note(STEP, model.train(batch))
        if not on_gpu:  # beside the buffers that the steps have left, which only grow
            evaluate()
            save()
    return Peaks(model.weights, model.gradients, model.moments, phases)
