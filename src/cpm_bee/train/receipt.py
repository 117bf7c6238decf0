"""The receipt of a run, `SAVE/SAVE_NAME-receipt.json`: what went in, and what came out.

It is a JSON object with a checksum of itself:

    status      running, finished, interrupted or failed
    parts       the run and each resume of it, with the number of steps done before: settings,
                inputs with their hashes (`hashes`), code and environment (`environment`)
    result      how it ended: step, figures, hashes of the weights and of the log

It is written when a run begins and when it ends; one that still says "running" long afterwards is
that of a run that was killed. The losses of the steps are in the log. `replay` compares with it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from cpm_bee import __version__, checksums
from cpm_bee.checkpoint.verification import sha256_of
from cpm_bee.engine import Engine
from cpm_bee.errors import InputError, InterruptedRun, RunError, describe
from cpm_bee.files import atomic_file
from cpm_bee.model.network import CPMBee
from cpm_bee.train.checks import Inputs
from cpm_bee.train.environment import code_of, environment_of
from cpm_bee.train.hashes import quick_hash
from cpm_bee.train.input_hashes import InputHashes
from cpm_bee.train.options import Options
from cpm_bee.train.receipt_reader import FORMAT, read_receipt
from cpm_bee.train.training_state import TrainingState

logger = logging.getLogger(__name__)

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
# Weights up to this size are read for their hash, which takes about a second.
_WEIGHTS_TO_READ = 1 << 30
# Not settings of the run that its file would repeat.
_OF_ONE_START = ("resume", "dry_run")


class Begun(Protocol):
    """What this module needs to know of a run: see `setup.Run`."""

    @property
    def model(self) -> CPMBee: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def state(self) -> TrainingState: ...
    @property
    def is_resumed(self) -> bool: ...


@contextmanager
def recorded(options: Options, inputs: Inputs, run: Begun) -> Iterator[None]:
    """Returns the context in which a run trains; rank 0 writes its settings and its receipt.

    Raises:
        RunError: the run has finished, but its receipt cannot be written.
    """
    if run.engine.rank != 0:
        yield
        return
    receipt = Receipt(options, inputs, run)
    receipt.begin()
    try:
        yield
    except BaseException as error:
        is_signal = isinstance(error, (InterruptedRun, KeyboardInterrupt))
        with suppress(OSError):  # of the disk that may have ended the run
            receipt.end(INTERRUPTED if is_signal else FAILED, str(error) or type(error).__name__)
        raise
    try:
        receipt.end(FINISHED)
    except OSError as error:
        raise RunError(
            f"{describe(error)}; the run has finished, and its weights are saved"
        ) from error


class Receipt:
    """The receipt of a run that goes on; on rank 0."""

    def __init__(self, options: Options, inputs: Inputs, run: Begun) -> None:
        self._options, self._run, self._files = options, run, inputs.files
        self._inputs = InputHashes(options, inputs)
        self._parts = _earlier_parts(self._place, run.state.step) if run.is_resumed else []
        self._part = {
            "steps_before": run.state.step if run.is_resumed else 0,
            "folder": os.getcwd(),
            "settings": _plain(asdict(options)),
            "code": code_of(),
            "environment": environment_of(run.engine, run.model),
        }

    @property
    def _place(self) -> Path:
        return self._files.places.to_write(self._files.receipt)

    def begin(self) -> None:
        """Write the settings of the run, and the receipt as it is now."""
        notes = [
            "The settings of a run, which this repeats: "
            f"python {self._options.script} --config {self._files.config.name}",
            f"Paths are those seen from {os.getcwd()}",
        ]
        with atomic_file(self._files.places.to_write(self._files.config)) as file:
            file.write(self._options.as_config(notes, leave_out=_OF_ONE_START))
        self._write(RUNNING, None)

    def end(self, status: str, reason: str = "") -> None:
        """Write the receipt with its result; a run that has finished waits for all hashes."""
        if status == FINISHED:
            self._inputs.background.wait()
        self._inputs.background.stop()
        self._write(status, self._result(reason))

    def _write(self, status: str, result: dict[str, Any] | None) -> None:
        part = {**self._part, **self._inputs.current()}
        values = {
            "format": FORMAT,
            "written_by": f"cpm_bee {__version__}",
            "status": status,
            "parts": [*self._parts, part],
            "result": result,
        }
        with atomic_file(self._place) as file:
            file.write(json.dumps(checksums.sealed(_plain(values)), indent=1) + "\n")

    def _result(self, reason: str) -> dict[str, Any]:
        log = self._files.places.to_write(self._files.log)
        events = last_events(log)
        weights = {}
        for name, path in (("best", self._files.best), ("last", self._files.last)):
            path = self._files.places.to_write(path)
            if path.is_file():
                found = quick_hash(path, small=_WEIGHTS_TO_READ)
                weights[name] = {"file": path.name, **(found or {})}
        state = self._run.state
        return {
            "step": state.step,
            "reason": reason.splitlines()[0] if reason else events.get("end", {}).get("reason"),
            "best_loss": state.best_loss if "eval" in events else None,
            "best_exact_match": state.best_exact_match if "eval" in events else None,
            "last_step": events.get("train"),
            "last_evaluation": events.get("eval"),
            "weights": weights,
            # Of the log so far: an error adds its line after this.
            "log": {"bytes": log.stat().st_size, "sha256": sha256_of(log, "")},
        }


def last_events(log: Path) -> dict[str, dict[str, Any]]:
    """Returns the last event of each kind in a log; lines that are not whole are left out."""
    last: dict[str, str] = {}
    with open(log, encoding="utf-8") as file:
        for line in file:
            kind = line.partition('"event": "')[2].partition('"')[0]
            if line.endswith("}\n"):
                last[kind] = line
    return {kind: json.loads(line) for kind, line in last.items() if kind}


def _earlier_parts(path: Path, step: int) -> list[dict[str, Any]]:
    """The parts of a resumed run that have done steps which it keeps."""
    try:
        parts: list[dict[str, Any]] = read_receipt(path)["parts"]
    except InputError as error:
        logger.warning(f"{error}; the new receipt begins after step {step}")
        return []
    return [part for part in parts if part["steps_before"] < step]


def _plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are not finite become null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
