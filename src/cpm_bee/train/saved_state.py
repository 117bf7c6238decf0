"""Reads training states, and checks that one is complete and well formed before it is used."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cpm_bee.checkpoint.reader import load_tensors
from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import DamagedFile, InputError, Problems, shown
from cpm_bee.train.run_folder import RunFolder

logger = logging.getLogger(__name__)

# The fields of `TrainingState` with their minimum values.
_PROGRESS = {
    "step": 0, "epoch": 0, "step_in_epoch": 0, "records_in_epoch": 0,
    "evaluations_without_gain": 0, "evaluated_step": -1, "saved_step": -1, "best_loss": None,
    "best_exact_match": None,
}  # fmt: skip
_NOT_IN_OLDER = {"best_exact_match"}
_PARTS = ("settings", "delta", "engine", "progress")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_DEPTH = 8


def check_state(path: Path, state: dict[Any, Any]) -> None:
    """Raise `DamagedFile` with everything that is wrong with a training state.

    This does not check whether it belongs to this run and this model.
    """
    problems = Problems()
    for part in _PARTS:
        if not isinstance(state.get(part), dict):
            problems.add(part, "is missing or not a dictionary")
    if not isinstance(state.get("base_fingerprint"), str):
        problems.add("base_fingerprint", "is missing or not a text")
    # Not in older states:
    for part in ("vocabulary_fingerprint", "evaluation_fingerprint", "metric_for_best"):
        if not isinstance(state.get(part, ""), str):
            problems.add(part, "is not a text")
    if not problems.count:
        for part in ("settings", "delta"):
            if not _is_plain(state[part]):
                problems.add(part, "holds values that are neither texts nor numbers")
        problems.extend("progress", _progress_problems(state["progress"]))
        problems.extend("engine", _engine_problems(state["engine"]))
    try:
        problems.raise_if_any(f"{path}: not a training state, or a damaged one:")
    except InputError as error:
        raise DamagedFile(str(error)) from None


def newest_intact(states: Sequence[Path]) -> tuple[Path, dict[Any, Any]]:
    """Returns the first state that is not damaged, with its path; names the damaged ones.

    Args:
        states: their paths, newest first.

    Raises:
        DamagedFile: all of them are damaged.
        InputError: that state is not a training state.
    """
    problems = Problems()
    for path in states:
        try:
            state = load_tensors(path, "a training state", verify=True)
            check_state(path, state)
        except DamagedFile as error:
            problems.include(error)
            continue
        if problems.count:
            logger.warning(f"{_one_line(problems)}; resuming from {path} instead")
        return path, state
    raise DamagedFile(
        f"{_one_line(problems)}; no earlier state is intact: start again without --resume, or "
        "put an intact copy there"
    )


def _one_line(problems: Problems) -> str:
    return " ".join(problems.text().split())


def saved_delta_config(folder: str, name: str, path: Path | None = None) -> DeltaConfig | None:
    """The settings of the delta in a run's newest training state; None if there is no such state.

    Args:
        path: another state to read instead.

    Raises:
        InputError: the state is damaged.
    """
    if path is None:
        files = RunFolder(Path(folder), name, ["-state.pt"], 1).current()
        path = next((file for file in files if file.name == f"{name}-state.pt"), None)
    if path is None or not path.is_file():
        return None
    state = load_tensors(path, "a training state")
    check_state(path, state)
    saved = state["delta"]
    if not saved:
        return None
    try:
        return DeltaConfig(**{**saved, "targets": tuple(saved["targets"])})
    except (TypeError, KeyError):
        raise InputError(f"{path}: its delta is {shown(saved)}, not what a run saves") from None


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth == _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, (str, int, float))


def _progress_problems(progress: dict[Any, Any]) -> Iterator[str]:
    for name in progress.keys() - _PROGRESS.keys():
        yield f"{shown(name)} is unknown; another version wrote this state"
    for name, least in _PROGRESS.items():
        value = progress.get(name)
        if name not in progress:
            if name in _NOT_IN_OLDER:
                continue
            yield f"{name} is missing"
        elif least is None:
            if not isinstance(value, float) or math.isnan(value):
                yield f"{name} is {shown(value)}, expected a number"
        elif type(value) is not int or not least <= value < 2**63:
            yield f"{name} is {shown(value)}, expected a number from {least}"


def _engine_problems(engine: dict[Any, Any]) -> Iterator[str]:
    tensors, moments = engine.get("tensors"), engine.get("optimizer")
    if not isinstance(tensors, dict) or not isinstance(moments, dict):
        yield "tensors or optimizer is missing"
        return
    if tensors.keys() != moments.keys():
        yield "the optimizer's tensors are not the trained ones"
        return
    for name, tensor in tensors.items():
        own = moments[name]
        if not _has_values(tensor):
            yield f"{shown(name)} is not a tensor with values"
        elif not isinstance(own, dict) or not all(_has_values(own.get(m)) for m in _MOMENTS):
            yield f"the optimizer's values of {shown(name)} are missing"
        elif any(own[moment].shape != tensor.shape for moment in _MOMENTS):
            yield f"the optimizer's values of {shown(name)} have a different shape"
        elif not _has_values(own.get("step")) or own["step"].dim() != 0:
            yield f"the optimizer's step of {shown(name)} is missing"
    scale, steps = engine.get("loss_scale"), engine.get("good_steps")
    if not isinstance(scale, (int, float)) or not 0 < scale <= 2**127:
        yield f"loss_scale is {shown(scale)}, expected a number above 0"
    if type(steps) is not int or not 0 <= steps < 2**63:
        yield f"good_steps is {shown(steps)}, expected a number from 0"


def _has_values(value: Any) -> bool:
    return (
        torch.is_tensor(value)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and value.is_floating_point()
    )
