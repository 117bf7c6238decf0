"""The training loop."""

from __future__ import annotations

import math
import time
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

import torch

from cpm_bee.engine import Engine, StepResult
from cpm_bee.engine.finite import not_finite
from cpm_bee.errors import InterruptedRun, RunError, describe
from cpm_bee.model.network import CPMBee
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.data_loader import DataLoader, PlannedStep
from cpm_bee.train.digest import DIGEST_STEPS, digest_of_tensors
from cpm_bee.train.evaluation import NUM_SAMPLES, evaluate
from cpm_bee.train.log import Reporter
from cpm_bee.train.options import NO_REPORT, Options
from cpm_bee.train.prefetch import Batches
from cpm_bee.train.schedules import learning_rate
from cpm_bee.train.signals import Signals
from cpm_bee.train.training_state import GAINS, TrainingState


def _require_finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise RunError(f"the {name} is {loss}; a lower --lr or a longer --warmup-iters may help")


class Trainer:
    """Trains a model that an engine has been prepared for.

    Args:
        evaluation: the evaluation set's loader, or None to train without.
        files: where to write; used on rank 0.
        state: where to begin; the engine must have loaded the same state.
        digests: whether the log gets digests of the trained tensors.
    """

    def __init__(
        self,
        model: CPMBee,
        engine: Engine,
        training: DataLoader,
        evaluation: DataLoader | None,
        options: Options,
        files: RunFiles,
        reporter: Reporter,
        state: TrainingState,
        *,
        digests: bool = True,
    ) -> None:
        self._model = model
        self._engine = engine
        self._training = training
        self._evaluation = evaluation
        self._options = options
        self._files = files
        self._reporter = reporter
        self._signals = Signals()
        self._saved_at = time.monotonic()
        self._digests = digests
        self.state = state

    def run(self) -> str:
        """Train to the end; returns the reason for the end, which is also logged.

        Raises:
            RunError: the loss or the gradients are not finite, a file could not be written, or the
                run was interrupted; the last good state is saved.
        """
        try:
            return self._run()
        except OSError as error:  # a full disk, or a file system that is gone
            reason = f"{describe(error)}; {self._kept()}"
            with suppress(OSError):
                self._reporter.end(reason, self.state.step)
            raise RunError(reason) from error

    def _kept(self) -> str:
        steps = self.state.saved_step
        if steps < 0:
            return "this run had not saved a state; what earlier runs saved is kept"
        return (
            f"the state saved after {steps} steps is kept ({self._files.state}): make room, and "
            "the same command with --resume goes on from there"
        )

    def _run(self) -> str:
        state = self.state
        self._model.train()
        with self._signals:
            try:
                if state.evaluated_step < 0:
                    self._evaluate()
                if state.saved_step < 0:
                    self._save()  # for a run that fails at once
                reason = self._train()
                if state.evaluated_step != state.step:
                    self._evaluate()
            except InterruptedRun as error:
                self._save()
                self._reporter.end(str(error), state.step)
                raise
            except RunError as error:
                reason = self._fault_of_base() or str(error)
                if state.saved_step >= 0:
                    reason += f"; the state saved after {state.saved_step} steps is kept"
                self._reporter.end(reason, state.step)
                raise RunError(reason) from error
            self._save()
        self._reporter.end(reason, state.step, finished=True)
        return reason

    def _fault_of_base(self) -> str:
        """Returns what is wrong with the values of the base model; "" if they are finite."""
        names = not_finite(self._model, only_frozen=self.state.step > 0)
        if not names:
            return ""
        more = f" and in {len(names) - 3} more tensors" if len(names) > 3 else ""
        return (
            f"{self._options.load}: there are values that are not finite in {', '.join(names[:3])}"
            f"{more}: the checkpoint is damaged, or its values are too large for --dtype "
            f"{self._options.dtype}"
        )

    def replay(self) -> str:
        """Train as `run` does, without evaluating or saving; returns the reason for the end."""
        self._model.train()
        return self._train()

    def _train(self) -> str:
        """Run the remaining epochs; returns the reason for the end."""
        if self.state.step == 0:
            self._note_digest()
        reason = self._steps()
        self._note_digest()
        return reason

    def _note_digest(self) -> None:
        """Log a digest of the trained tensors, which a replay is compared with; collective."""
        if self._digests:
            tensors = self._engine.trained_tensors()
            if self._engine.rank == 0:
                self._reporter.digest(self.state.step, digest_of_tensors(tensors))

    def _steps(self) -> str:
        state, limit = self.state, self._options.max_steps
        while state.epoch < self._options.epoch:
            # On an exception too, the thread that makes the next batches ends with its steps.
            with closing(self._training.batches(state.epoch, state.step_in_epoch)) as steps:
                started = time.perf_counter()
                for step, batches in steps:
                    if limit is not None and state.step >= limit:
                        return f"the limit of {limit} steps (--max-steps) is reached"
                    if reason := self._step(step, batches, started):
                        return reason
                    started = time.perf_counter()
            state.epoch += 1
            state.step_in_epoch = state.records_in_epoch = 0
        return f"all {self._options.epoch} epochs are done"

    def _step(self, step: PlannedStep, batches: Batches, started: float) -> str | None:
        """Run an optimizer step and what is due after it; returns a reason to stop, if any."""
        options, engine, state = self._options, self._engine, self.state
        # Dropout masks differ between ranks and between steps, and are the same after a resume.
        torch.manual_seed((options.seed + state.step) * engine.world_size + engine.rank)
        part_losses = [0.0] * len(step.part_targets)  # of each dataset of a mixture
        own_loss = 0.0  # this rank's share of the mean over all targets of the step on all ranks
        for number, batch in enumerate(batches):
            if batch is None:
                continue
            weight = 1 if number < len(step.shares) else 0  # 0: a filler
            with engine.autocast():
                share = self._model.loss(batch) * weight / step.targets
            engine.backward(share)
            own = share.item()
            own_loss += own
            if part_losses and weight:
                part_losses[step.share_parts[number]] += own
            del share  # and what its graph holds, before the next forward pass
        # The same reduction tells all ranks of a signal to any of them, so that all end after the
        # same step, and whether to save: their clocks differ.
        flags = (self._signals.count > 0, self._is_late())
        sums = [own_loss, *map(float, flags), *part_losses]
        loss, signals, is_late, *part_losses = engine.reduce(sums)
        _require_finite(loss, f"loss of step {state.step + 1}")
        lr = learning_rate(
            options.lr_decay_style,
            options.lr,
            options.start_step + state.step,
            options.warmup_iters,
            options.schedule_end,
        )
        loss_scale = engine.loss_scale  # `engine.step` may change it
        result = engine.step(lr)
        state.step += 1
        state.step_in_epoch += 1
        state.records_in_epoch += step.records
        self._log(step, loss, part_losses, lr, loss_scale, result, time.perf_counter() - started)

        if state.step in DIGEST_STEPS:
            self._note_digest()
        if state.step % options.inspect_iters == 0:
            self._reporter.inspection(state.step, engine.statistics())
        if state.step % options.eval_interval == 0:
            self._evaluate()
        if is_late or state.step % (options.save_interval or options.eval_interval) == 0:
            self._save()
        if signals:
            raise InterruptedRun(
                f"interrupted after step {state.step}; the same command with --resume goes on from "
                "there"
            )
        if state.evaluations_without_gain >= options.early_stop_patience:
            patience, gain = options.early_stop_patience, GAINS[options.metric_for_best]
            return f"early stop: {patience} evaluations in a row without {gain}"
        return None

    def _is_late(self) -> bool:
        """Whether the state was last saved longer ago than --save-minutes."""
        minutes = self._options.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _log(
        self,
        step: PlannedStep,
        loss: float,
        part_losses: list[float],
        lr: float,
        loss_scale: float,
        result: StepResult,
        seconds: float,
    ) -> None:
        values: dict[str, Any] = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "loss_scale": loss_scale,
            "tokens": step.tokens,
            "tokens_per_second": step.tokens / seconds,
        }
        if names := self._training.part_names:
            values["dataset_losses"] = {
                name: total * step.targets / targets if targets else None
                for name, total, targets in zip(names, part_losses, step.part_targets, strict=True)
            }
        self._reporter.train_step(
            values,
            seconds=seconds,
            row_fill=step.tokens / self._training.tokens_per_step,
            skipped=result.skipped,
            done=self._done(),
        )

    def _done(self) -> float:
        """The share of the run that is done, if nothing ends it early."""
        state, options = self.state, self._options
        of_epoch = state.records_in_epoch / self._training.num_records
        shares = [(state.epoch + min(of_epoch, 1.0)) / options.epoch]
        if options.max_steps is not None:
            shares.append(state.step / options.max_steps)
        return min(1.0, max(shares))

    def _evaluate(self) -> None:
        state, options = self.state, self._options
        if self._evaluation is None:
            state.evaluated_step = state.step
            self._reporter.no_evaluation()
            return
        samples = 0 if options.report == NO_REPORT else NUM_SAMPLES
        result = evaluate(self._model, self._engine, self._evaluation, samples)
        _require_finite(result.loss, f"evaluation loss after {state.step} steps")
        best = state.add_evaluation(result.loss, result.exact_match, options.metric_for_best)
        # Logged first: the log tells which best weights are later than a state, also after a kill.
        self._reporter.evaluation(state.step, result, best)
        if best:
            self._save_weights("best")

    def _save(self) -> None:
        """Save the last weights and the state, at most once per step."""
        state = self.state
        if state.saved_step == state.step:
            return
        before, state.saved_step = state.saved_step, state.step
        try:
            self._write_results()
        except BaseException:
            state.saved_step = before
            raise

    def _write_results(self) -> None:
        state = self.state
        self._save_weights("last")
        if self._evaluation is None:
            self._save_weights("best")  # without evaluations, the last are the best
        engine_state = self._engine.training_state()
        if self._engine.rank == 0:
            settings = self._training.settings
            previous = self._files.save_state(engine_state, asdict(state), settings)
            if previous is not None:
                self._reporter.line(f"the files of the previous run are in {previous}")
        self._engine.barrier()
        self._saved_at = time.monotonic()

    def _save_weights(self, which: str) -> None:
        tensors = self._engine.trained_tensors()
        if self._engine.rank == 0:
            path = self._files.best if which == "best" else self._files.last
            self._files.save_weights(path, tensors)
