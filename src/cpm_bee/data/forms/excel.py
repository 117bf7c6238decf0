"""Rows of Excel files: of all sheets that are not empty, or of one."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_bee.data.forms.tables import EXTRA, Cells, Row, column_names, named_cells
from cpm_bee.errors import InputError


def is_excel(path: Path) -> bool:
    return path.suffix.lower() == ".xlsx"


def excel_rows(path: Path, *, no_header: bool = False, sheet: str | None = None) -> Iterator[Row]:
    """Yields the rows of the sheets, each of which has a header of its own.

    Args:
        no_header: see `tables.named_cells`.
        sheet: the name of the one to read; None is all that are not empty.

    Raises:
        InputError: the file cannot be read, has no such sheet, or its sheets have different
            columns.
    """
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"{path}: {EXTRA.format('openpyxl')}") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path}: not an Excel file ({error})") from None
    try:
        chosen = _chosen(path, book.worksheets, sheet)
        if len(chosen) > 1:
            _require_same_columns(path, chosen, no_header)
        for each in chosen:
            where = str(path) if len(book.worksheets) == 1 else f"{path}[{each.title}]"
            yield from named_cells(Path(where), _cells(where, each), no_header)
    finally:
        book.close()


def _chosen(path: Path, sheets: list[Any], name: str | None) -> list[Any]:
    if name is None:
        return [sheet for sheet in sheets if next(_cells("", sheet), None)]
    found = [sheet for sheet in sheets if sheet.title == name]
    if not found:
        names = ", ".join(repr(sheet.title) for sheet in sheets)
        raise InputError(f"{path}: has no sheet {name!r} (--sheet); there are: {names}")
    return found


def _require_same_columns(path: Path, sheets: list[Any], no_header: bool) -> None:
    """Raise `InputError`, naming the columns of all sheets, if these are not the same."""
    columns = []
    for sheet in sheets:
        _, cells, _ = next(_cells("", sheet))
        assert cells is not None
        names = [] if no_header else column_names(Path(f"{path}[{sheet.title}]"), cells)
        columns.append([name for name in names if name] or [f"{len(cells)} without names"])
    if any(sorted(names) != sorted(columns[0]) for names in columns):
        listed = "".join(
            f"\n  {sheet.title!r}: {', '.join(names)}"
            for sheet, names in zip(sheets, columns, strict=True)
        )
        raise InputError(
            f"{path}: its sheets have different columns; convert one of them (convert_data.py "
            f"--sheet NAME), or save them as files of their own{listed}"
        )


def _cells(where: str, sheet: Any) -> Iterator[Cells]:
    """Yields the rows that are not empty, at least as wide as the first of them."""
    width = 0
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = list(row)
        while cells and cells[-1] is None:
            cells.pop()
        if cells:
            width = width or len(cells)
            cells += [None] * (width - len(cells))
            yield f"{where}:{number}", cells, None
