"""What a simulated run holds is what a real one holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cpm_bee import delta
from cpm_bee.data.batch import Batch
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.buffers import buffer_pool
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.train.live_storages import LiveStorages
from cpm_bee.train.memory_estimate import (
    TrainingSetup,
    meta_model,
    set_parameters,
    typical_batch,
)
from cpm_bee.train.plan import simulation
from cpm_bee.train.plan.simulation import EVALUATION, SAVING, STEP, Workload, simulate

CONFIG = ModelConfig(
    vocab_size=2000, dim_model=64, num_heads=2, dim_head=32, dim_ff=128, num_layers=3
)
LORA = TrainingSetup(torch.float32, delta.DeltaConfig())
WAYS = {
    "LoRA": LORA,
    "LoRA, checkpointing": replace(LORA, checkpointing=True),
    "LoRA, nf4": replace(LORA, quantize="nf4"),
    "in full": TrainingSetup(torch.float32),
}


def batches(lengths: Sequence[Sequence[int]], *, as_generated: bool = False) -> list[Batch]:
    return [
        typical_batch(one, 4, CONFIG.vocab_size, num_pairs=3, as_generated=as_generated)
        for one in lengths
    ]


WORK = Workload(
    [batches([[40, 30, 30]]), batches([[50, 20], [33]])],
    batches([[60, 20], [7]], as_generated=True),
)


def real_peaks(config: ModelConfig, training: TrainingSetup, work: Workload) -> dict[str, int]:
    """The most bytes of tensors that a real engine and model keep in each phase."""
    found: dict[str, int] = {}

    def storage(nbytes: int) -> torch.UntypedStorage:
        return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()

    with LiveStorages() as live, buffer_pool.simulated(storage):

        def end(phase: str) -> None:
            found[phase] = max(found.get(phase, 0), live.peak)
            live.peak = live.live

        model = meta_model(config, training)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.format = FORMATS[training.quantize]
        set_parameters(
            model, training, lambda shape, dtype: torch.empty(shape, dtype=dtype).zero_()
        )
        engine = TorchEngine(torch.device("cpu"), training.dtype)
        engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))

        def evaluate_and_save() -> None:
            live.peak = live.live
            model.eval()
            for batch in work.evaluation:
                model.score(batch)
            model.train()
            end(EVALUATION)
            engine.trained_tensors()
            engine.training_state()
            end(SAVING)

        evaluate_and_save()
        for step in work.steps:
            for batch in step:
                loss = model.loss(batch) / sum(b.num_targets for b in step)
                engine.backward(loss)
                del loss
            engine.step(1e-3)
            end(STEP)
        evaluate_and_save()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_phases_are_those_of_a_real_run(way: str) -> None:
    expected = real_peaks(CONFIG, WAYS[way], WORK)
    found = simulate(CONFIG, WAYS[way], WORK)
    assert found.phases.keys() == expected.keys()
    for phase, peak in expected.items():
        # The codes of real NF4 have temporaries, those of the simulated one do not.
        bound = 0.15 if "nf4" in way else 0.001
        assert found.phases[phase] == pytest.approx(peak, rel=bound), phase
    assert found.peak == max(found.phases.values()) == found.phases[found.worst]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["LoRA", "in full"])
def test_a_deep_model_is_continued_from_shallow_ones(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replace(CONFIG, num_layers=9)
    whole = simulate(deep, WAYS[way], WORK)
    monkeypatch.setattr(simulation, "_WHOLE", 0)
    continued = simulate(deep, WAYS[way], WORK)
    assert continued.weights == whole.weights
    assert continued.moments == whole.moments
    for phase, peak in whole.phases.items():
        assert continued.phases[phase] == pytest.approx(peak, rel=0.01), phase


@pytest.mark.slow
def test_an_evaluation_leaves_its_buffers_for_the_rest_of_the_run() -> None:
    without = simulate(CONFIG, LORA, replace(WORK, evaluation=()))
    large = replace(WORK, evaluation=batches([[30] * 80], as_generated=True))
    with_it = simulate(CONFIG, LORA, large)
    kept = 256 * CONFIG.vocab_size * 4  # the logits of a piece of targets
    assert with_it.phases[SAVING] >= without.phases[SAVING] + kept // 2
    on_gpu = [simulate(CONFIG, LORA, w, on_gpu=True).phases[STEP] for w in (WORK, large)]
    assert on_gpu[1] - on_gpu[0] < kept // 100  # where no logits are kept


def test_a_half_checkpoint_is_copied_twice_in_full_fine_tuning() -> None:
    usual, half = (
        simulate(replace(CONFIG, half=half), WAYS["in full"], replace(WORK, steps=[]))
        for half in (False, True)
    )
    assert usual.phases[SAVING] == half.phases[SAVING]  # the state takes more than both
    assert usual.phases[SAVING] >= usual.weights + usual.moments + 3 * usual.weights
