"""The options of a replay: those of the run, on the CPU, with its files where they are now."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from cpm_bee.config_file import from_json
from cpm_bee.data.mixture import parts_of
from cpm_bee.errors import InputError, Problems
from cpm_bee.model.flex_attention import SDPA
from cpm_bee.options import REQUIRED
from cpm_bee.paths import not_a_file, not_a_file_or_folder, not_a_folder
from cpm_bee.train.options import AUTO, NEVER, NO_REPORT, Options
from cpm_bee.train.replay_options import ReplayOptions
from cpm_bee.train.training_state import LOSS

_NEVER = 10**12  # steps
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def replay_settings(part: dict[str, Any], given: ReplayOptions, steps: int, folder: str) -> Options:
    """The options of a replay.

    Raises:
        InputError: settings are unknown to this version, or files are not where they were.
    """
    values: dict[str, Any] = {}
    problems = Problems()
    flags = {flag.name: flag for flag in Options.flags()}
    for name, value in part["settings"].items():
        if name not in flags:
            problems.add(name, "is a setting that this version does not know")
            continue
        try:
            values[name] = from_json(flags[name], value)
        except InputError as error:
            problems.add(flags[name].flag, str(error))
    problems.extend(
        "settings",
        (
            f"{f.flag} is missing"
            for f in flags.values()
            if f.default is REQUIRED and f.name not in values
        ),
    )
    problems.raise_if_any(f"{given.receipt}: its settings cannot be used:")
    run, environment = Options(**values), part["environment"]
    on_cpu = environment["device"] == "cpu"
    return replace(
        run,
        **_files(part, given, run),
        eval_dataset=None, metric_for_best=LOSS, accumulate=run.accumulate * environment["ranks"],
        epoch=_NEVER, max_steps=steps, save=folder, save_name="replay", save_interval=_NEVER,
        save_minutes=None, inspect_iters=_NEVER, resume=NEVER, report=NO_REPORT, report_to=(),
        tensorboard=None, engine=AUTO, parallel=AUTO, offload=False, device="cpu", dry_run=False,
        verify=False, dtype=_DTYPES.get(environment["dtype"], AUTO), attention=SDPA,
        checkpointing="full" if environment["checkpointing"] else "none",
        compile=run.compile and on_cpu,
    )  # fmt: skip


def _files(part: dict[str, Any], given: ReplayOptions, run: Options) -> dict[str, Any]:
    """The paths of a run where they are now."""
    recorded = part["data"]["dataset"]
    dataset = given.dataset or ",".join(
        d["path"] if len(recorded) == 1 and d["weight"] == 1 else f"{d['path']}={d['weight']!r}"
        for d in recorded
    )
    config = given.model_config or run.model_config
    if given.model_config is None and config != AUTO:
        config = os.path.join(part["folder"], config)
    vocab = given.vocab or part["vocabulary"]["path"]
    if given.load is not None and given.vocab is None and run.vocab is None:
        vocab = None  # beside the base
    delta = given.init_delta or (part.get("init_delta") or {}).get("path")
    load = given.load or part["base"].get("path")
    problems = Problems()

    def require(flag: str, path: str | None, reason: str | None) -> None:
        if path is not None and reason is not None:
            problems.add(path, f"{reason}; if it is elsewhere now, give {flag}")

    for one in parts_of(dataset):
        require("--dataset", one.folder, not_a_folder(one.folder))
    if load is not None:
        require("--load", load, not_a_file_or_folder(load, "checkpoint"))
    if config != AUTO:
        require("--model-config", config, not_a_file(config))
    if vocab is not None:
        require("--vocab", vocab, not_a_file(vocab, "vocabulary"))
    if given.eval_dataset is not None:
        require("--eval-dataset", given.eval_dataset, not_a_folder(given.eval_dataset))
    if run.init_delta is None and given.init_delta is not None:
        problems.add(given.init_delta, "--init-delta: this run began with a new delta")
    if run.init_delta is not None:
        require("--init-delta", delta or run.init_delta, not_a_file(delta or run.init_delta))
    problems.raise_if_any(f"{given.receipt}: files of the run are missing:")
    return {
        "dataset": dataset, "load": load, "model_config": config, "vocab": vocab,
        "init_delta": delta if run.init_delta is not None else None,
    }  # fmt: skip
