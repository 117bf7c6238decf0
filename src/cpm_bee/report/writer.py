"""When the report of a run is written, and with which curves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpm_bee.files import atomic_file
from cpm_bee.report.charts import charts_of
from cpm_bee.report.drawing import Curves, Drawing, can_draw
from cpm_bee.report.facts import Facts
from cpm_bee.report.history import History
from cpm_bee.report.page import make_page

logger = logging.getLogger(__name__)


class ReportWriter:
    """Writes the page and the picture of a run.

    Args:
        place: returns where a file is to be written now (`RunFolder.to_write`).
        page, picture: the files.
        with_curves: false for tables only.
    """

    def __init__(
        self,
        place: Callable[[Path], Path],
        page: Path,
        picture: Path,
        facts: Facts,
        *,
        with_curves: bool,
    ) -> None:
        self._place = place
        self._page, self._picture = page, picture
        self._facts = facts
        self._history = History()
        self._wants_curves = with_curves
        self._drawing = Drawing() if with_curves and can_draw() else None
        self._curves: Curves | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Add an event of the log, as its JSON value."""
        self._history.add(event)

    def write(self) -> None:
        """Write the page with the curves that there are, and begin to draw new ones.

        Raises:
            OSError: it cannot be written; the error names the file.
        """
        self._write_page()
        if self._drawing is not None:
            self._drawing.begin(charts_of(self._history), self._history.step)

    def write_new_curves(self) -> None:
        """Write the page again if new curves have been drawn."""
        if self._drawing is not None and (curves := self._drawing.take()) is not None:
            self._write_curves(curves)

    def write_end(self) -> None:
        """Write the page of a run that has ended, and wait for its curves."""
        self._write_page()  # first: a kill may come while the curves are drawn
        if self._drawing is None:
            return
        curves = None
        with suppress(KeyboardInterrupt):  # nobody wants to wait; the training is over
            curves = self._drawing.draw_now(charts_of(self._history), self._history.step)
        if curves is not None:
            self._write_curves(curves)
        elif self._drawing.failure:
            self._write_page()  # it says why there are no curves

    def _write_curves(self, curves: Curves) -> None:
        self._curves = curves
        with atomic_file(self._place(self._picture), "wb") as file:
            file.write(curves.png)
        self._write_page()

    def _write_page(self) -> None:
        try:
            text = self._make_page()
        except Exception as error:  # no fault of the page may end a training of days
            logger.warning(f"no report can be made of this log: {type(error).__name__}: {error}")
            return
        with atomic_file(self._place(self._page)) as file:
            file.write(text)

    def _make_page(self) -> str:
        drawing = self._drawing
        lacks = self._wants_curves and drawing is None
        return make_page(
            self._history,
            self._facts,
            self._curves,
            lacks_matplotlib=lacks,
            failure="" if drawing is None else drawing.failure,
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
