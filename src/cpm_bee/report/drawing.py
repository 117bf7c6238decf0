"""Has another process draw the curves while the training goes on.

Drawing takes seconds, most of them for the import of matplotlib. In this process it would stop the
training; another one, with the lowest priority, takes what the training leaves of the processor,
and rests between drawings. A thread waits for it.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

_SOURCE = Path(__file__).resolve().parent.parent.parent
_TIMEOUT = 120  # seconds
# Times as long as a drawing took, before the next one begins: together with the first one, at most
# 1% of a core in any run that is as long as 100 drawings.
_REST = 200


class Curves(NamedTuple):
    """Drawn curves.

    Attributes:
        svg: images by the name of the chart.
        png: of loss and learning rate.
        step: the last step that they show.
    """

    svg: dict[str, str]
    png: bytes
    step: int


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


class Drawing:
    """Draws curves in the background, one drawing at a time.

    Attributes:
        failure: why the last drawing failed, or "".
    """

    def __init__(self) -> None:
        self.failure = ""
        self._thread: threading.Thread | None = None
        self._drawn: Curves | None = None
        self._began = self._took = 0.0

    def begin(self, charts: dict[str, Any], step: int) -> None:
        """Begin to draw, unless a drawing is being made or the last one was a moment ago."""
        rests = self._took and time.monotonic() - self._began < _REST * self._took
        if charts and self._thread is None and not rests:
            self._start(charts, step)

    def take(self) -> Curves | None:
        """Returns curves that have been drawn since the last call, without waiting for them."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        drawn, self._drawn = self._drawn, None
        return drawn

    def draw_now(self, charts: dict[str, Any], step: int) -> Curves | None:
        """Draw, and wait for it; None if there is nothing to draw, or it fails."""
        if self._thread is not None:
            self._thread.join()
        if charts:
            self._start(charts, step)
            assert self._thread is not None
            self._thread.join()
        return self.take()

    def _start(self, charts: dict[str, Any], step: int) -> None:
        self._began = time.monotonic()
        # A daemon: this process does not wait for it if it ends by an error.
        self._thread = threading.Thread(target=self._draw, args=(charts, step), daemon=True)
        self._thread.start()

    def _draw(self, charts: dict[str, Any], step: int) -> None:
        paths = [str(_SOURCE), os.environ.get("PYTHONPATH", "")]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "cpm_bee.report.draw"],
                input=json.dumps(charts),
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "PYTHONIOENCODING": "utf-8",
                    "OMP_NUM_THREADS": "1",
                },
                encoding="utf-8",
                capture_output=True,
                timeout=_TIMEOUT,
                check=True,
                start_new_session=True,  # Ctrl-C is for the training
            )
            images = json.loads(done.stdout)
            self._drawn = Curves(images["svg"], base64.b64decode(images["png"]), step)
            self.failure = ""
        except subprocess.CalledProcessError as error:
            self.failure = (error.stderr or "").strip().rpartition("\n")[2] or str(error)
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            self.failure = str(error)
        self._took = time.monotonic() - self._began
