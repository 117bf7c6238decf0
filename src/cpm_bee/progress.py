"""Progress bars: tqdm's on a terminal, silent elsewhere."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str,
    unit: str,
    quiet: bool = False,
    delay: float = 0,
) -> Any:
    """A tqdm bar, over an iterable or advanced by `update`; bytes ("B") are scaled.

    Shows nothing if `quiet`, where stderr is no terminal, and before `delay` seconds have passed;
    leaves nothing behind.
    """
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        disable=True if quiet else None,
        leave=False,
        delay=delay,
    )


def print_above_bar(text: str, file: TextIO | None = None) -> None:
    """Print a line, above a progress bar where one is shown; to stdout where no file is given.

    A reader that has gone away (`| head`, a closed terminal) does not end the work that reports:
    from then on the stream leads nowhere.
    """
    stream = file or sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        _lead_nowhere(stream.fileno())


def silence_terminal() -> None:
    """Redirect stdout and stderr to nowhere if they are a terminal, which has been closed."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _lead_nowhere(descriptor)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
