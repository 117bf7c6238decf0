"""What is predicted of a process with FSDP is what PyTorch allocates there, in each phase."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import forked
import pytest
import sharded_memory
import train_support
from support import ROOT

from cpm_bee.model.frozen import buffers
from cpm_bee.train.plan.sharded import simulate_sharded
from cpm_bee.train.plan.simulation import EVALUATION, SAVING, STEP, Workload
from cpm_bee.train.sharded_estimate import estimate_sharded

CONFIG, SHARDS = sharded_memory.CONFIG, sharded_memory.SHARDS
WORK = Workload([[sharded_memory.BATCH]], [sharded_memory.EVALUATION_BATCH])


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    script = ROOT / "tests" / "sharded_memory.py"
    environment = train_support.environment(PYTHONPATH=path)
    done = forked.run(
        [sys.executable, str(script)], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", sharded_memory.BATCHES)
@pytest.mark.parametrize("name", sharded_memory.CASES)
def test_phases_are_those_of_real_passes(
    name: str, kind: str, measured: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "_use_count", None)  # as in the process that was measured
    training = sharded_memory.CASES[name]
    work = replace(WORK, steps=[[sharded_memory.BATCHES[kind]]])
    found = simulate_sharded(CONFIG, training, work, SHARDS)
    expected = dict(measured[f"{name}, {kind}"])
    if (name, kind) == ("full, bf16", "few targets"):
        # PyTorch adds the embedding's two gradients in place, but not those of fake tensors.
        expected[STEP] += 4 * CONFIG.vocab_size * CONFIG.dim_model
    for phase in (EVALUATION, STEP, SAVING):
        assert found.phases[phase] == pytest.approx(expected[phase], rel=0.01), phase


@pytest.mark.slow
def test_a_step_alone_and_what_evaluations_leave() -> None:
    """The pool keeps what an evaluation has made, as in a run of one process."""
    alone = estimate_sharded(CONFIG, sharded_memory.LORA, sharded_memory.BATCH, SHARDS)
    on_gpu = simulate_sharded(CONFIG, sharded_memory.LORA, WORK, SHARDS, on_gpu=True)
    assert on_gpu.phases[STEP] == pytest.approx(alone.peak, rel=1e-3)
    assert SAVING not in on_gpu.phases  # it is copied to the host
    on_host = simulate_sharded(CONFIG, sharded_memory.LORA, WORK, SHARDS)
    without = simulate_sharded(CONFIG, sharded_memory.LORA, Workload(WORK.steps), SHARDS)
    assert EVALUATION not in without.phases
    assert on_host.phases[STEP] > without.phases[STEP] >= alone.peak
