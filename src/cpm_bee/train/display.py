"""A run on the terminal: a bar with the time left and the loss, or a line every few steps."""

from __future__ import annotations

import sys
import time
from typing import Any

from cpm_bee.language import said
from cpm_bee.progress import print_above_bar, progress_bar


class Display:
    """Shows the steps of a run, and lines above them.

    Where both stdout and stderr are a terminal, a bar shows the steps. Otherwise, every
    `log_interval` steps, a line does; the first step has one, and each that was skipped.
    """

    def __init__(self, log_interval: int, epochs: int) -> None:
        self._interval = log_interval
        self._epochs = epochs
        self._has_bar = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: Any = None
        self._clock: _Clock | None = None

    def step(
        self,
        values: dict[str, Any],
        *,
        seconds: float,
        row_fill: float,
        skipped: bool,
        done: float,
    ) -> None:
        """Show an optimizer step with the `values` of the log.

        Args:
            seconds: of this step.
            done: the share of the run that is done, from 0 to 1.
        """
        # The clock begins after the first step, which is slower than the others.
        self._clock = self._clock or _Clock(done)
        left = shown_seconds(self._clock.seconds_left(done))
        if self._has_bar:
            self._show_bar(values, done, left)
        elif skipped or values["step"] == 1 or values["step"] % self._interval == 0:
            self.line(
                f"| Epoch: {values['epoch']:3d} | Iter: {values['step']:6d} "
                f"| loss: {values['loss']:.4f} | lr: {values['lr']:.4e} "
                f"| scale: {values['loss_scale']:.4f} | time: {seconds:.4f} "
                f"| token/max: {row_fill:.4f} | grad_norm: {values['grad_norm']:.4f} "
                f"| tokens/s: {values['tokens_per_second']:.0f} | left: {left} |"
                + (" overflow, step skipped" if skipped else "")
            )

    def _show_bar(self, values: dict[str, Any], done: float, left: str) -> None:
        is_new = self._bar is None
        if is_new:
            self._bar = progress_bar(
                total=1,
                description="",
                unit="",
                bar_format="{desc}{percentage:3.0f}%|{bar}|{postfix}",
            )
        epoch = f"epoch {values['epoch'] + 1}/{self._epochs}"
        self._bar.set_description(f"{epoch}, step {values['step']}", refresh=False)
        self._bar.set_postfix_str(f"{left} left, loss {values['loss']:.4f}", refresh=False)
        self._bar.update(done - self._bar.n)
        if is_new:
            self._bar.refresh()  # `update` shows little that comes within 0.1 s

    def line(self, text: str) -> None:
        print_above_bar(said(text))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Clock:
    """Estimates the time left from the share of the run that is done.

    Evaluations and saving are part of the time.
    """

    def __init__(self, done: float) -> None:
        self._first_done = done
        self._first_ended = time.monotonic()

    def seconds_left(self, done: float) -> float | None:
        """None where it cannot be told."""
        if done > self._first_done:
            rate = (done - self._first_done) / (time.monotonic() - self._first_ended)
            return (1 - done) / rate
        return None if done < 1 else 0.0


def shown_seconds(seconds: float | None) -> str:
    """Hours, minutes and seconds: `2:03:04`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
