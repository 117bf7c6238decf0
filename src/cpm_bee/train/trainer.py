"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

import torch

from cpm_bee.distributed import rank
from cpm_bee.engine import Engine, StepResult
from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.data_loader import DataLoader, PlannedStep
from cpm_bee.train.evaluation import evaluate
from cpm_bee.train.log import Reporter
from cpm_bee.train.options import Options
from cpm_bee.train.prefetch import Batches
from cpm_bee.train.schedules import learning_rate


def _require_finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise RunError(f"the {name} is {loss}; a lower --lr or a longer --warmup-iters may help")


@dataclass
class TrainingState:
    """Where a run stands; with the engine's state, all that resuming needs."""

    step: int = 0  # finished steps of this run
    epoch: int = 0
    step_in_epoch: int = 0
    records_in_epoch: int = 0
    best_loss: float = math.inf
    evaluations_without_gain: int = 0
    evaluated_step: int = -1
    saved_step: int = -1


class _Interrupted(RunError):
    """A signal ended the run; unlike after other errors, its state is good and is saved."""


class _Stop(Exception):
    """Ends the loop; its text is the reason."""


class Trainer:
    """Trains a model that an engine has been prepared for.

    Args:
        evaluation: the evaluation set's loader, or None to train without.
        files: where to write; used on rank 0.
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
    ) -> None:
        self._model = model
        self._engine = engine
        self._training = training
        self._evaluation = evaluation
        self._options = options
        self._files = files
        self._reporter = reporter
        self._signals = 0
        self._interrupted = False
        self.state = TrainingState()

    def resume(self) -> None:
        """Take up the state saved in the run's folder. Raises `InputError` if it does not fit."""
        engine_state, state = self._files.load_state(self._training.settings)
        self._engine.load_training_state(engine_state)
        self.state = TrainingState(**state)

    def run(self) -> str:
        """Train to the end; returns the reason why it ended, which is also written down.

        Raises:
            RunError: the loss or the gradients are not finite, or the run was interrupted; the
                last good state is saved.
        """
        self._model.train()
        with self._watch_signals():
            try:
                if self.state.step == 0:
                    self._evaluate()
                    self._save()  # what a run that breaks at once falls back to
                reason = self._train()
            except _Interrupted as error:
                self._save()
                self._reporter.end(str(error), self.state.step)
                raise
            except RunError as error:
                reason = self._broken(error)
                self._reporter.end(reason, self.state.step)
                raise RunError(reason) from error
            self._save()
        self._reporter.end(reason, self.state.step)
        return reason

    def _broken(self, error: RunError) -> str:
        saved = self.state.saved_step
        return f"{error}; the state saved after {saved} steps is kept" if saved >= 0 else str(error)

    def _train(self) -> str:
        try:
            self._epochs()
            reason = f"all {self._options.epoch} epochs are done"
        except _Stop as stop:
            reason = str(stop)
        if self.state.evaluated_step != self.state.step:
            self._evaluate()
        return reason

    def _epochs(self) -> None:
        while self.state.epoch < self._options.epoch:
            with closing(self._remaining_steps()) as steps:
                started = time.perf_counter()
                for step, batches in steps:
                    self._check_limits()
                    self._train_step(step, batches, started)
                    self._after_step()
                    started = time.perf_counter()
            self.state.epoch += 1
            self.state.step_in_epoch = self.state.records_in_epoch = 0

    def _remaining_steps(self) -> Generator[tuple[PlannedStep, Batches], None, None]:
        epoch, done = self.state.epoch, self.state.step_in_epoch
        bar = progress_bar(
            total=self._training.num_records,
            initial=self.state.records_in_epoch,
            description=f"epoch {epoch + 1}/{self._options.epoch}",
            unit="records",
            quiet=self._engine.rank > 0,
        )
        with bar:
            for step, batches in self._training.batches(epoch, done):
                yield step, batches
                bar.update(step.records)

    def _check_limits(self) -> None:
        limit = self._options.max_steps
        if limit is not None and self.state.step >= limit:
            raise _Stop(f"the limit of {limit} steps (--max-steps) is reached")

    def _train_step(self, step: PlannedStep, batches: Batches, started: float) -> None:
        options, engine, state = self._options, self._engine, self.state
        # Dropout: other masks on every rank and step, and the same ones after a resume.
        torch.manual_seed((options.seed + state.step) * engine.world_size + engine.rank)
        loss = self._forward_backward(step, batches)
        _require_finite(loss, f"loss of step {state.step + 1}")
        rate = learning_rate(
            options.lr_decay_style,
            options.lr,
            options.start_step + state.step,
            options.warmup_iters,
            options.schedule_end,
        )
        scale = engine.loss_scale
        result = engine.step(rate)
        state.step += 1
        state.step_in_epoch += 1
        state.records_in_epoch += step.records
        self._report(step, loss, rate, scale, result, time.perf_counter() - started)

    def _forward_backward(self, step: PlannedStep, batches: Batches) -> float:
        """The mean loss over all targets of the step on all ranks; adds up its gradients.

        In the same exchange all ranks learn of a signal that any of them got, so that they leave
        at the same step.
        """
        total = 0.0
        for number, batch in enumerate(batches):
            if batch is None:
                continue
            weight = 1 if number < len(step.shares) else 0  # 0: it only keeps other ranks going
            with self._engine.autocast():
                loss = self._model.loss(batch) * weight / step.targets
            self._engine.backward(loss)
            total += loss.item()
        mean, signals = self._engine.reduce([total, float(self._signals > 0)])
        self._interrupted = signals > 0
        return mean

    def _report(
        self,
        step: PlannedStep,
        loss: float,
        rate: float,
        scale: float,
        result: StepResult,
        seconds: float,
    ) -> None:
        values = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "loss": loss,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "loss_scale": scale,
            "tokens": step.tokens,
            "tokens_per_second": step.tokens / seconds,
        }
        self._reporter.train_step(
            values,
            seconds=seconds,
            row_fill=step.tokens / self._training.tokens_per_step,
            skipped=result.skipped,
        )

    def _after_step(self) -> None:
        options, step = self._options, self.state.step
        if step % options.inspect_iters == 0:
            self._reporter.inspection(step, self._engine.statistics())
        if step % options.eval_interval == 0:
            self._evaluate()
        if step % (options.save_interval or options.eval_interval) == 0:
            self._save()
        if self._interrupted:
            raise _Interrupted(f"interrupted after step {step}; --resume goes on from there")
        patience = options.early_stop_patience
        if self.state.evaluations_without_gain >= patience:
            raise _Stop(f"early stop: {patience} evaluations in a row without a lower loss")

    def _evaluate(self) -> None:
        state = self.state
        if self._evaluation is None:
            state.evaluated_step = state.step
            return
        result = evaluate(self._model, self._engine, self._evaluation)
        state.evaluated_step = state.step
        _require_finite(result.loss, f"evaluation loss after {state.step} steps")
        best = result.loss < state.best_loss
        if best:
            state.best_loss = result.loss
            state.evaluations_without_gain = 0
            self._save_weights("best")
        else:
            state.evaluations_without_gain += 1
        self._reporter.evaluation(state.step, result, best)

    def _save(self) -> None:
        """Save last weights and state, once a step."""
        state = self.state
        if state.saved_step == state.step:
            return
        state.saved_step = state.step
        self._save_weights("last")
        if self._evaluation is None:
            self._save_weights("best")  # nothing to choose by
        engine_state = self._engine.training_state()
        if self._engine.rank == 0:
            self._files.save_state(engine_state, asdict(state), self._training.settings)
        self._engine.barrier()

    def _save_weights(self, which: str) -> None:
        tensors = self._engine.trained_tensors()
        if self._engine.rank == 0:
            path = self._files.best if which == "best" else self._files.last
            self._files.save_weights(path, tensors)

    @contextmanager
    def _watch_signals(self) -> Iterator[None]:
        """Let a running step end before Ctrl-C or SIGTERM takes effect."""

        def note(number: int, frame: object) -> None:
            rank.is_terminating |= number == signal.SIGTERM
            # torchrun passes Ctrl-C on as SIGTERM, so only a second Ctrl-C means "at once".
            self._signals += number == signal.SIGINT or not self._signals
            if self._signals > 1:
                raise KeyboardInterrupt

        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
