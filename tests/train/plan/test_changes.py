"""Changes that are suggested make a run fit, and milder ones would not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cpm_bee.delta import DeltaConfig
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.data_size import DataSize, DataSurvey
from cpm_bee.train.plan import changes
from cpm_bee.train.plan.changes import KnownPeaks, possible_changes, smallest_changes
from cpm_bee.train.plan.memory import Situation, on_gpu
from cpm_bee.train.plan.simulation import STEP, Peaks

CONFIG = ModelConfig(
    vocab_size=500, dim_model=64, num_heads=2, dim_head=32, dim_ff=128, num_layers=2
)
LENGTHS = np.array([100, 40, 30, 60, 80, 50] * 20)
SURVEY = DataSurvey(DataSize(120, 0, 9), LENGTHS, np.full(120, 3), True)
LORA = Situation(
    config=CONFIG,
    dtype=torch.bfloat16,
    delta=DeltaConfig(),
    quantize="none",
    checkpointing=False,
    training=SURVEY,
    evaluation=None,
    rows=4,
    accumulate=1,
    processes=1,
    shards=1,
    max_length=256,
    max_tokens=None,
    seed=1,
)
GIB = 2**30


def cost(situation: Situation) -> Peaks:
    """A price for each setting, instead of the memory of a model."""
    tokens = situation.max_tokens or situation.rows * situation.max_length
    weights = (4 if situation.quantize == "nf4" else 16) * GIB // situation.shards
    trained = 0 if situation.delta else 48 * GIB // situation.shards
    rest = tokens * GIB // (128 if situation.checkpointing else 64)
    return Peaks(weights, trained, 0, {STEP: weights + trained + rest})


def test_a_real_micro_batch_that_is_split_needs_less() -> None:
    whole = on_gpu(LORA)
    split = on_gpu(replace(LORA, max_tokens=128))
    assert split.weights == whole.weights
    assert split.peak < whole.peak


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "on_gpu", cost)


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("card", [8, 12, 16, 24])
@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("delta", [DeltaConfig(), None], ids=["LoRA", "in full"])
def test_what_is_suggested_fits_and_less_does_not(
    card: int, auto: bool, delta: DeltaConfig | None
) -> None:
    situation = replace(LORA, delta=delta)
    peaks = KnownPeaks(auto)
    assert peaks.fits(situation, card) is None
    possible = {c.flag: c for c in possible_changes(situation, auto)}
    found = smallest_changes(situation, card, peaks, list(possible.values()))
    assert found
    for fix in found:
        parts = parsed(fix.flags, possible)
        changed = situation
        for flag, value in parts:
            changed = possible[flag].apply(changed, value)
        assert peaks.fits(changed, card) == fix.peak
        for left_out in range(len(parts)):
            fewer = situation
            for flag, value in parts[:left_out] + parts[left_out + 1 :]:
                fewer = possible[flag].apply(fewer, value)
            assert peaks.fits(fewer, card) is None, (fix.flags, left_out)


def parsed(flags: str, possible: dict[str, Any]) -> list[tuple[str, int]]:
    """The changes in a text, each with its value, or 0."""
    found = []
    for flag in sorted(possible, key=len, reverse=True):
        if flag in flags:
            before, _, after = flags.partition(flag)
            word = after.split()[0] if after.split() else ""
            found.append((flag, int(word) if word.isdigit() else 0))
            flags = before + after
    return found[::-1]


def test_nothing_is_suggested_twice_or_where_it_is_set() -> None:
    flags = [c.flag for c in possible_changes(LORA, auto_checkpointing=True)]
    assert flags == [
        "--max-tokens",
        "--quantize nf4",
        "--parallel fsdp, GPUS_PER_NODE",
        "--max-length",
    ]
    done = replace(LORA, quantize="nf4", checkpointing=True, shards=2, processes=2, max_tokens=100)
    assert [c.flag for c in possible_changes(done, auto_checkpointing=False)] == ["--max-length"]
    odd = replace(LORA, config=replace(CONFIG, dim_model=60, num_heads=3, dim_head=20))
    assert "--quantize nf4" not in [c.flag for c in possible_changes(odd, True)]
