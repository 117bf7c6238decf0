"""Plans a run from its checked inputs: `plan.py`, and the end of a dry run."""

from __future__ import annotations

import json
import os

from cpm_bee.engine.select import expected_distribution
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file
from cpm_bee.paths import unwritable_file
from cpm_bee.train.activation_checkpointing import choose_for_run
from cpm_bee.train.checks import Inputs, check
from cpm_bee.train.model_options import AUTO
from cpm_bee.train.options import Options
from cpm_bee.train.plan.changes import KnownPeaks, possible_changes, smallest_changes
from cpm_bee.train.plan.disk import disk_use
from cpm_bee.train.plan.measurement import measure
from cpm_bee.train.plan.memory import CARDS, Situation, for_gpu, on_host
from cpm_bee.train.plan.options import PlanOptions
from cpm_bee.train.plan.result import Card, RunPlan
from cpm_bee.train.plan.text import lines_of
from cpm_bee.train.plan.times import run_time


def run_plan(options: PlanOptions) -> list[str]:
    """Check the inputs, plan, write `--json`, and return the lines to print.

    Raises:
        InputError: flags, files or data are wrong.
        RunError: a step could not be measured.
    """
    if options.json is not None and (reason := unwritable_file(options.json)):
        raise InputError(f"--json {options.json}: {reason}")
    if options.processes is not None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(options.processes))
    run = options.of_run()
    inputs = check(run)
    if _none_fits(run, inputs):
        raise InputError(
            f"--max-length {run.max_length}: none of the first records of {run.dataset} fits, "
            "so there is nothing to plan from"
        )
    plan = make_plan(run, inputs)
    if options.json is not None:
        with atomic_file(options.json) as file:
            json.dump(plan.as_json(), file, indent=1)
            file.write("\n")
    return lines_of(plan)


def _none_fits(options: Options, inputs: Inputs) -> bool:
    return not (inputs.surveys["--dataset"].lengths <= options.max_length).any()


def plan_lines(options: Options, inputs: Inputs) -> list[str]:
    """Returns what plan.py prints; for a dry run."""
    if _none_fits(options, inputs):
        return ["plan: none of the first records fits into --max-length"]
    return lines_of(make_plan(options, inputs))


def make_plan(options: Options, inputs: Inputs) -> RunPlan:
    """Plan a run; takes seconds, as it measures steps of a few layers."""
    situation = situation_of(options, inputs)
    planned = situation.batches()
    typical = planned.typical()
    counts = [int((typical.target_records == r).sum()) for r in range(len(typical.lengths))]
    measured = measure(options, list(typical.lengths), counts, situation.training.num_pairs)
    is_cpu = inputs.device.type == "cpu"
    host = on_host(situation) if is_cpu else None
    gpu_situation = for_gpu(situation)
    peaks = KnownPeaks(options.checkpointing == AUTO)
    gpu = peaks.of(gpu_situation)
    disk = disk_use(options, inputs)
    total = options.epoch * inputs.surveys["--dataset"].size.min_steps
    steps = min(total, options.max_steps or total)
    step_tokens = planned.tokens_per_step()
    evaluation_tokens = _evaluation_tokens(inputs, situation)
    held = host or gpu
    time = run_time(
        options,
        measured,
        steps=steps,
        step_tokens=step_tokens,
        evaluation_tokens=evaluation_tokens,
        weights=held.weights,
        saved=disk.weights // 2 + disk.states // options.save_total_limit,
    )
    overhead = measured.anonymous + measured.mapped
    # Weights and moments, copied whole to the host of rank 0 to be saved.
    copies = 3 * held.gradients * situation.shards
    return RunPlan(
        host=host,
        gpu=gpu,
        measured=measured,
        host_peak=overhead + (copies if host is None else host.peak),
        processes=inputs.num_processes,
        steps=steps,
        step_tokens=step_tokens,
        evaluation_tokens=evaluation_tokens,
        time=time,
        disk=disk,
        cards=_cards(gpu_situation, peaks, options.checkpointing == AUTO),
    )


def situation_of(options: Options, inputs: Inputs) -> Situation:
    training = inputs.surveys["--dataset"]
    config, processes = inputs.pretrained.model.config, inputs.num_processes
    _, is_sharded = expected_distribution(
        inputs.engine,
        options.parallel,
        options.offload,
        inputs.pretrained.model,
        inputs.device,
        processes,
    )
    choice = choose_for_run(
        options,
        config,
        inputs.delta_config,
        inputs.device,
        inputs.dtype,
        training.lengths,
        training.num_targets,
        num_processes=processes,
        is_sharded=is_sharded,
    )
    return Situation(
        config=config,
        dtype=inputs.dtype,
        delta=inputs.delta_config,
        quantize=options.quantize,
        checkpointing=choice.checkpointing,
        training=training,
        evaluation=inputs.surveys.get("--eval-dataset"),
        rows=options.batch_size,
        accumulate=options.accumulate,
        processes=processes,
        shards=processes if is_sharded else 1,
        max_length=options.max_length,
        max_tokens=options.max_tokens,
        seed=options.seed,
        max_steps=options.max_steps,
    )


def _evaluation_tokens(inputs: Inputs, situation: Situation) -> float:
    """The tokens of one process in an evaluation of the whole set."""
    found = situation.evaluation
    if found is None:
        return 0.0
    lengths = found.lengths[found.lengths <= situation.max_length]
    return float(lengths.mean()) * found.size.num_records / inputs.num_processes


def _cards(situation: Situation, peaks: KnownPeaks, auto_checkpointing: bool) -> list[Card]:
    changes = possible_changes(situation, auto_checkpointing)
    found = []
    for gigabytes in CARDS:
        peak = peaks.fits(situation, gigabytes)
        fixes = []
        if peak is None:
            fixes = smallest_changes(situation, gigabytes, peaks, changes)
        found.append(Card(gigabytes, peak, fixes))
    return found
