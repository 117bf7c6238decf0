"""Signals that end a run after its running step."""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Any

from cpm_bee.distributed import rank
from cpm_bee.progress import silence_terminal


class Signals:
    """A context in which Ctrl-C, SIGTERM or a closed terminal only count, the first time.

    Attributes:
        count: the signals so far; the second one raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._old: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: object) -> None:
        rank.is_terminating |= number == signal.SIGTERM
        if number == signal.SIGHUP:
            silence_terminal()
        # torchrun forwards Ctrl-C as SIGTERM, so there only a second Ctrl-C means "at once".
        again = number == signal.SIGINT or "TORCHELASTIC_RUN_ID" not in os.environ
        self.count += again or not self.count
        if self.count > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> Signals:
        watched = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
            watched.append(signal.SIGHUP)
        self._old = {s: signal.signal(s, self._note) for s in watched}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # torchrun's SIGTERM must not end this process before it has reported its error.
        if error is not None and "TORCHELASTIC_RUN_ID" in os.environ and rank.is_reporting_rank():
            self._old.pop(signal.SIGTERM, None)
        for number, handler in self._old.items():
            signal.signal(number, handler)
