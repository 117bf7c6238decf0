"""Progress bars: tqdm's on a terminal, silent elsewhere."""

from __future__ import annotations

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
    """Print a line, above a progress bar where one is shown; to stdout where no file is given."""
    tqdm.write(text, file=file)
