"""The output of a dry run: what would run, after `checks` has found no mistake.

A dry run is one process without torch.distributed, and writes nothing. It plans for WORLD_SIZE
processes, which scripts/finetune_cpm_bee.sh sets as torchrun would for rank 0. That script sets
CPM_BEE_CHECKS_ONLY too where a run follows, which then does not wait for a plan.
"""

from __future__ import annotations

import os

from cpm_bee.engine.select import expected_distribution
from cpm_bee.errors import RunError
from cpm_bee.train.activation_checkpointing import choose_for_run
from cpm_bee.train.checks import Inputs, step_shapes
from cpm_bee.train.initial_delta import init_delta_line
from cpm_bee.train.options import Options
from cpm_bee.train.plan.run import plan_lines
from cpm_bee.train.summary import (
    KINDS,
    checkpointing_line,
    data_lines,
    engine_line,
    model_line,
    schedule_warnings,
)


def describe_run(options: Options, inputs: Inputs) -> list[str]:
    """Returns the lines that a run would begin with, its steps, and where its results would go."""
    distribution, is_sharded = expected_distribution(
        inputs.engine,
        options.parallel,
        options.offload,
        inputs.pretrained.model,
        inputs.device,
        inputs.num_processes,
    )
    lines = [
        engine_line(
            inputs.engine, inputs.num_processes, inputs.device, inputs.dtype, options.loss_scale
        ),
        model_line(inputs.pretrained.model),
        *init_delta_line(options, inputs.saved_state is not None),
    ]
    for flag, found in inputs.surveys.items():
        about = "" if found.is_exact else "about "
        lines += data_lines(KINDS[flag], found.size, options.max_length, about=about)
    lines += _step_lines(options, inputs)
    lines += schedule_warnings(options, inputs.surveys["--dataset"].size.min_steps)
    lines.append(distribution)
    lines.append(_checkpointing_line(options, inputs, is_sharded))
    lines += _result_lines(options, inputs)
    if not os.environ.get("CPM_BEE_CHECKS_ONLY"):
        lines += _plan_lines(options, inputs)
    lines.append("dry run: no problems were found, and nothing was written")
    return lines


def _plan_lines(options: Options, inputs: Inputs) -> list[str]:
    try:
        return plan_lines(options, inputs)
    except RunError as error:  # the checks found no mistake, and that is what was asked first
        return [f"no plan: {error}"]


def _step_lines(options: Options, inputs: Inputs) -> list[str]:
    shape = step_shapes(options, inputs.num_processes)["--dataset"]
    per_epoch = inputs.surveys["--dataset"].size.min_steps
    total = options.epoch * per_epoch
    limited = ""
    if options.max_steps is not None and options.max_steps < total:
        total, limited = options.max_steps, " (--max-steps)"
    lines = [
        f"a step: {shape.rows} rows of {shape.max_length} tokens (--batch-size "
        f"{options.batch_size} x --accumulate {options.accumulate} x {inputs.num_processes} "
        "process(es))",
        f"steps: about {per_epoch} per epoch, {total} in total{limited}",
    ]
    if inputs.saved_state is not None:
        lines.append(f"resumes after step {inputs.saved_state[1]['step']}")
    if inputs.fresh_start:
        lines.append(inputs.fresh_start)
    return lines


def _checkpointing_line(options: Options, inputs: Inputs, is_sharded: bool) -> str:
    found = inputs.surveys["--dataset"]
    if found.size.num_records == 0:
        return "checkpointing: none of the first records fits into --max-length"
    choice = choose_for_run(
        options,
        inputs.pretrained.model.config,
        inputs.delta_config,
        inputs.device,
        inputs.dtype,
        found.lengths,
        found.num_targets,
        num_processes=inputs.num_processes,
        is_sharded=is_sharded,
    )
    return checkpointing_line(choice)


def _result_lines(options: Options, inputs: Inputs) -> list[str]:
    files = inputs.files
    lines = [f"results: {files.best}, {files.last}; log: {files.log}"]
    begins_new_run = inputs.saved_state is None or files.begins_new_run
    if begins_new_run and files.places.present():
        lines.append(f"the files of the previous run would be moved to {files.places.previous}")
    return lines
