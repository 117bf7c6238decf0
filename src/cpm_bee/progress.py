"""Progress bars: tqdm on a terminal, silent elsewhere."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from cpm_bee.errors import DISK_FULL


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str,
    unit: str,
    quiet: bool = False,
    delay: float = 0,
    bar_format: str | None = None,
) -> Any:
    """Returns a tqdm bar over an iterable, or advanced by `update`; bytes ("B") are scaled.

    The bar is hidden if `quiet`, if stderr is not a terminal, and for the first `delay` seconds;
    it is cleared at the end.
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
        bar_format=bar_format,
    )


def print_above_bar(text: str, file: TextIO | None = None) -> None:
    """Print a line, above the progress bar if there is one; to stdout if no file is given.

    If the reader has gone (`| head`, a closed terminal) or the disk is full, the stream is
    redirected to /dev/null, so that the run goes on.
    """
    stream = file or sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO, *DISK_FULL):
            raise
        _redirect_to_null(stream.fileno())
        if error.errno in DISK_FULL and stream is not sys.stderr:
            warning = f"warning: standard output cannot be written: {error.strerror}"
            print_above_bar(f"{warning}; this goes on without it", file=sys.stderr)


def silence_terminal() -> None:
    """Redirect stdout and stderr to /dev/null if they are a terminal, which has been closed."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _redirect_to_null(descriptor)


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
