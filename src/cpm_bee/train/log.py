"""The output of a run: lines for people, JSON lines for programs, the report, loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cpm_bee.disk import NamedFile, append
from cpm_bee.engine import TensorStatistics
from cpm_bee.files import atomic_file
from cpm_bee.report.writer import ReportWriter
from cpm_bee.train.display import Display
from cpm_bee.train.evaluation import Evaluation
from cpm_bee.train.loggers import Logger
from cpm_bee.train.memory_use import memory_use
from cpm_bee.train.training_state import order

_SCALARS = ("loss", "lr", "grad_norm", "loss_scale", "tokens_per_second")


class Reporter:
    """Writes `SAVE/SAVE_NAME-log.jsonl` and all that is told of a run. Silent on ranks above 0.

    As a context it also tells of a run that an error ends.

    Args:
        path: the log; None on ranks above 0.
        resumed_step: the step after which a resumed run continues; log lines of later steps are
            dropped, since these run again. None starts a new log.
        evaluated_step: likewise the step of the last evaluation of a resumed run.
        display: lines and a bar for people.
        report: the report of the run, or None.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        resumed_step: int | None,
        evaluated_step: int,
        task: str,
        display: Display,
        loggers: Sequence[Logger] = (),
        report: ReportWriter | None = None,
    ) -> None:
        self._file: NamedFile | None = None
        self._task = task
        self._display = display
        self._loggers = loggers
        self._report = report
        self._step = resumed_step or 0
        self._has_ended = False
        self._digested: set[int] = set()  # the steps after which there is a digest
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resumed_step is not None:
            limits = {"eval": evaluated_step, "samples": evaluated_step}
            kept = [
                (line, event)
                for line, event in log_lines(path)
                if event.get("step", 0) <= limits.get(event["event"], resumed_step)
            ]
        with atomic_file(path) as file:
            file.writelines(line for line, _ in kept)
        self._digested = {e["step"] for _, e in kept if e["event"] == "digest"}
        if report is not None:
            for _, event in kept:
                report.add(event)
        self._file = NamedFile(path, "a")

    def line(self, text: str) -> None:
        if self._file is not None:
            self._display.line(text)

    def _log(self, event: str, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        values = {"event": event} | {k: v if _is_json(v) else None for k, v in values.items()}
        append(self._file, (json.dumps(values, ensure_ascii=False) + "\n").encode())
        if self._report is not None:
            self._report.add(values)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, step)

    def _write_report(self) -> None:
        if self._report is not None:
            self._report.write()

    def start(self, settings: dict[str, Any]) -> None:
        self._log("start", {"task": self._task, **settings})
        self._write_report()

    def train_step(
        self, values: dict[str, Any], *, seconds: float, row_fill: float, skipped: bool, done: float
    ) -> None:
        """Log an optimizer step. `row_fill` is the share of the step's rows that holds tokens."""
        if self._file is None:
            return
        self._step = values["step"]
        self._log("train", values)
        self._scalars({f"train/{name}": values[name] for name in _SCALARS}, values["step"])
        self._display.step(values, seconds=seconds, row_fill=row_fill, skipped=skipped, done=done)
        if self._report is not None:
            self._report.write_new_curves()

    def digest(self, step: int, value: str) -> None:
        """Log the digest of the trained tensors after a step, once for each."""
        if step not in self._digested:
            self._digested.add(step)
            self._log("digest", {"step": step, "sha256": value})

    def evaluation(self, step: int, result: Evaluation, best: bool) -> None:
        values = {
            "loss": result.loss,
            "token_accuracy": result.token_accuracy,
            "exact_match": result.exact_match,
        }
        self._log("eval", {"step": step, **values, "records": result.records})
        if self._report is not None:
            samples = [sample.to_json() for sample in result.samples]
            self._log("samples", {"step": step, **memory_use(), "samples": samples})
        self._scalars({f"eval/{name}": value for name, value in values.items()}, step)
        self.line(
            f"| Eval after {step} steps | loss: {result.loss:.4f} "
            f"| token accuracy: {result.token_accuracy:.2%} "
            f"| exact match: {result.exact_match:.2%} | records: {result.records} |"
            + (" best so far" if best else "")
        )
        self._write_report()

    def no_evaluation(self) -> None:
        """Write the report where a run without an evaluation set would evaluate."""
        self._write_report()

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
        values = {"reason": reason, "step": step, "finished": finished}
        self._has_ended = not finished
        self._display.close()
        if finished:
            # First: a run whose log says that it has finished may replace an earlier one.
            self._end_others(values)
        self._log("end", values)
        self._has_ended = True
        self.line(f"training ended after {step} steps: {reason}")
        if not finished:
            self._end_others(values)

    def _end_others(self, values: dict[str, Any]) -> None:
        if self._report is not None:
            self._report.add({"event": "end", **values})
            self._report.write_end()
        for logger in self._loggers:
            logger.flush()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not self._has_ended:  # by whatever the trainer does not expect
            text = str(error).strip().splitlines()
            with suppress(OSError):
                self.end(f"{type(error).__name__}{': ' + text[0] if text else ''}", self._step)
        self.close()

    def close(self) -> None:
        self._display.close()
        if self._file is not None:
            self._file.close()
        for logger in self._loggers:
            logger.close()


def _is_json(value: Any) -> bool:
    # JSON has no NaN or infinity; the gradient norm of a skipped step is one of them.
    return not isinstance(value, float) or math.isfinite(value)


def best_loss_of(path: Path, metric: str) -> float:
    """Returns the loss of the best evaluation in a log; infinite if there is none."""
    found = [event for _, event in log_lines(path) if event["event"] == "eval"]
    keys = [(*order(e["loss"], e.get("exact_match", 0.0), metric), e["loss"]) for e in found]
    return max(keys)[-1] if keys else math.inf


def log_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a log and what they hold, without one cut short by a kill."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield line + "\n", json.loads(line)
