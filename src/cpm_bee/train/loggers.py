"""Loggers of other projects, which get the figures of a run: TensorBoard, wandb, SwanLab, Trackio.

A logger has `scalars` and `close`. The trackers share three functions, `init`, `log` and `finish`;
`_TRACKERS` says what their arguments are called:

    wandb     https://docs.wandb.ai/ref/python/init/
    swanlab   https://docs.swanlab.cn/en/api/py-init.html
    trackio   https://huggingface.co/docs/trackio/api

Whether they use the network is decided by their own environment variables (docs/training.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from cpm_bee.errors import DISK_FULL, InputError, naming
from cpm_bee.train.options import LOGGERS, TENSORBOARD, Options

logger = logging.getLogger(__name__)


class Logger(Protocol):
    """Where the figures of a run go; made on rank 0 alone."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log figures after a step, by names such as `train/loss`."""

    def flush(self) -> None:
        """Write what is not written yet."""

    def close(self) -> None: ...


class _Tracker(NamedTuple):
    name_argument: str  # of `init`
    project_variable: str  # environment variable that names the project
    offline: str  # how to do without its server


_TRACKERS = {
    "wandb": _Tracker("name", "WANDB_PROJECT", "WANDB_MODE=offline"),
    "swanlab": _Tracker("experiment_name", "SWANLAB_PROJ_NAME", "SWANLAB_MODE=offline"),
    "trackio": _Tracker("name", "TRACKIO_PROJECT", "no TRACKIO_SPACE_ID"),
}
assert {TENSORBOARD, *_TRACKERS} == set(LOGGERS)


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A tracker makes a folder of its own name where it runs, which Python finds as a package without
    files; that is none.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_loggers(options: Options) -> list[tuple[str, str]]:
    """Returns the flag and the reason for each requested logger that is not installed."""
    asked = [(f"--report-to {name}", name) for name in options.report_to]
    if options.tensorboard is not None and TENSORBOARD not in options.report_to:
        asked.append(("--tensorboard", TENSORBOARD))
    return [
        (flag, f"needs an extra: pip install -e '.[{name}]'")
        for flag, name in asked
        if not is_installed(name)
    ]


def open_loggers(options: Options) -> list[Logger]:
    """Open the requested loggers.

    Raises:
        InputError: one of them refuses to start, for example because nobody is logged in.
    """
    names = list(options.report_to)
    if options.tensorboard is not None and TENSORBOARD not in names:
        names.append(TENSORBOARD)
    return [
        _TensorBoard(options) if name == TENSORBOARD else _TrackerLogger(name, options)
        for name in names
    ]


class _TensorBoard:
    """Events in --tensorboard or, without it, in a new folder beside the results."""

    def __init__(self, options: Options) -> None:
        # An extra: torch's module imports it.
        from torch.utils.tensorboard import SummaryWriter

        folder = options.tensorboard
        if folder is None:
            # One for each start: TensorBoard shows each folder as a curve of its own.
            start = time.strftime("%Y%m%d-%H%M%S")
            folder = os.path.join(options.save, f"{options.save_name}-tensorboard", start)
        # Its thread fails where the disk is full; the next call here raises the same error again.
        threading.excepthook = _quiet_about_full_disks(threading.excepthook)
        self._folder, self._task = folder, options.task_name
        with naming(folder):
            # The folder of a link to a folder that is to be made.
            self._writer = SummaryWriter(os.path.realpath(folder))

    def scalars(self, values: dict[str, float], step: int) -> None:
        with naming(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(f"{self._task}/{name}", value, step)

    def flush(self) -> None:
        with naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with suppress(OSError):  # `flush` has raised it
            self._writer.close()


class _TrackerLogger:
    """wandb, swanlab or trackio. Its failures end no run: it is left out from there on."""

    def __init__(self, name: str, options: Options) -> None:
        tracker = _TRACKERS[name]
        self._name = name
        self._module: Any = importlib.import_module(name)
        project = os.environ.get(tracker.project_variable) or "cpm_bee"
        given = {"project": project, tracker.name_argument: options.save_name}
        try:
            self._module.init(**given, config=asdict(options))
        except (Exception, SystemExit) as error:  # whatever such a package raises
            raise InputError(
                f"--report-to {name}: {_first_line(error)} (without its server: {tracker.offline})"
            ) from None

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._try("log", values, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._try("finish")

    def _try(self, function: str, *values: Any, **named: Any) -> None:
        if self._module is None:
            return
        try:
            getattr(self._module, function)(*values, **named)
        except Exception as error:  # whatever such a package raises
            self._module = None
            logger.warning(
                f"--report-to {self._name}: {_first_line(error)}; the run goes on without it"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _quiet_about_full_disks(hook: Any) -> Any:
    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
            hook(args)

    return quiet
