"""The output of a run: lines for people, JSON lines for programs, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpm_bee.disk import NamedFile, append
from cpm_bee.engine import TensorStatistics
from cpm_bee.errors import DISK_FULL, naming
from cpm_bee.files import atomic_file
from cpm_bee.progress import print_above_bar
from cpm_bee.train.evaluation import Evaluation


class Reporter:
    """Writes `SAVE/SAVE_NAME-log.jsonl` and lines for people. Does nothing on ranks above 0.

    Args:
        path: the log; None on ranks above 0.
        resumed_step: the step after which a resumed run continues; log lines of later steps are
            dropped, since these run again. None starts a new log.
        evaluated_step: likewise the step of the last evaluation of a resumed run.
        tensorboard: the folder for TensorBoard events, or None.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        resumed_step: int | None,
        evaluated_step: int,
        task: str,
        tensorboard: str | None,
    ) -> None:
        self._file: NamedFile | None = None
        self._events: Any = None
        self._task = task
        if path is not None:
            self._events_folder = tensorboard
            with naming(tensorboard):
                self._events = _tensorboard_writer(tensorboard)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if resumed_step is not None:
                limits = {"eval": evaluated_step}
                kept = [
                    line
                    for line, event in _lines(path)
                    if event.get("step", 0) <= limits.get(event["event"], resumed_step)
                ]
            with atomic_file(path) as file:
                file.writelines(kept)
            self._file = NamedFile(path, "a")

    def line(self, text: str) -> None:
        if self._file is not None:
            print_above_bar(text)

    def _log(self, event: str, values: dict[str, Any]) -> None:
        if self._file is not None:
            values = {k: v if _is_json(v) else None for k, v in values.items()}
            line = json.dumps({"event": event, **values}, ensure_ascii=False) + "\n"
            append(self._file, line.encode())

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if self._events is not None:
            with naming(self._events_folder):
                for name, value in values.items():
                    self._events.add_scalar(f"{self._task}/{name}", value, step)

    def start(self, settings: dict[str, Any]) -> None:
        self._log("start", {"task": self._task, **settings})

    def train_step(
        self, values: dict[str, Any], *, seconds: float, row_fill: float, skipped: bool
    ) -> None:
        """Log an optimizer step. `row_fill` is the share of the step's rows that holds tokens."""
        self._log("train", values)
        if self._events is not None:
            names = ("loss", "lr", "grad_norm", "loss_scale", "tokens_per_second")
            self._scalars({f"train/{n}": values[n] for n in names}, values["step"])
        self.line(
            f"| Epoch: {values['epoch']:3d} | Iter: {values['step']:6d} "
            f"| loss: {values['loss']:.4f} | lr: {values['lr']:.4e} "
            f"| scale: {values['loss_scale']:.4f} | time: {seconds:.4f} "
            f"| token/max: {row_fill:.4f} | grad_norm: {values['grad_norm']:.4f} "
            f"| tokens/s: {values['tokens_per_second']:.0f} |"
            + (" overflow, step skipped" if skipped else "")
        )

    def evaluation(self, step: int, result: Evaluation, best: bool) -> None:
        values = {
            "loss": result.loss,
            "token_accuracy": result.token_accuracy,
            "exact_match": result.exact_match,
        }
        self._log("eval", {"step": step, **values, "records": result.records})
        self._scalars({f"eval/{name}": value for name, value in values.items()}, step)
        self.line(
            f"| Eval after {step} steps | loss: {result.loss:.4f} "
            f"| token accuracy: {result.token_accuracy:.2%} "
            f"| exact match: {result.exact_match:.2%} | records: {result.records} |"
            + (" best so far" if best else "")
        )

    def inspection(self, step: int, statistics: list[TensorStatistics]) -> None:
        width = max(len(s.name) for s in statistics)
        rows = [f"trained tensors after {step} steps:"]
        rows.append(f"{'name':{width}} {'shape':>16} {'mean':>11} {'std':>11} {'grad norm':>11}")
        rows += [
            f"{s.name:{width}} {list(s.shape)!s:>16} {s.mean:11.4e} {s.std:11.4e} "
            f"{s.grad_norm:11.4e}"
            for s in statistics
        ]
        self.line("\n".join(rows))

    def end(self, reason: str, step: int, *, finished: bool = False) -> None:
        self._log("end", {"reason": reason, "step": step, "finished": finished})
        if self._events is not None:
            with naming(self._events_folder):
                self._events.flush()
        self.line(f"training ended after {step} steps: {reason}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            with suppress(OSError):  # `end` has raised it
                self._events.close()


def _is_json(value: Any) -> bool:
    # JSON has no NaN or infinity; the gradient norm of a skipped step is one of them.
    return not isinstance(value, float) or math.isfinite(value)


def least_loss(path: Path) -> float:
    """Returns the lowest evaluation loss in a log; infinite if there is none."""
    losses = [event["loss"] for _, event in _lines(path) if event["event"] == "eval"]
    return min(losses, default=math.inf)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a log and what they hold, without one cut short by a kill."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield line + "\n", json.loads(line)


def _tensorboard_writer(folder: str | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # an extra that flag_checks.py has looked for

    # Its thread fails where the disk is full; the next call here raises the same error again.
    threading.excepthook = _quiet_about_full_disks(threading.excepthook)
    return SummaryWriter(os.path.realpath(folder))  # of a link to a folder that is to be made


def _quiet_about_full_disks(hook: Any) -> Any:
    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
            hook(args)

    return quiet
