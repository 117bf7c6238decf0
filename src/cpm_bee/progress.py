"""Progress bars: tqdm's on a terminal, silent elsewhere and where tqdm is not installed.

The data stages run under any Python 3.10, before anything is installed; hence the stand-in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class _NoBar:
    """As much of tqdm as is used here, showing nothing."""

    def __init__(self, iterable: Iterable[Any] | None) -> None:
        self._iterable = iterable or ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass


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
    if tqdm is None:
        return _NoBar(iterable)
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


def print_above_bar(text: str) -> None:
    """Print a line to stdout, above a progress bar where one is shown."""
    if tqdm is None:
        print(text, flush=True)
    else:
        tqdm.write(text)
