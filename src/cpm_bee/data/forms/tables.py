"""Rows of tables: CSV and TSV, and the names of their columns."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee.errors import InputError
from cpm_bee.json_lines import MAX_LINE

EXTRA = "needs the package {}: pip install -e '.[data]' -c constraints.txt"


class Row(NamedTuple):
    """A row and its place (file:line).

    Attributes:
        reason: why the row cannot be read; None if it can, and then `value` is the row.
    """

    where: str
    value: Any
    reason: str | None = None


Cells = tuple[str, "list[Any] | None", "str | None"]  # where, cells, reason


def named_cells(path: Path, rows: Iterator[Cells], no_header: bool) -> Iterator[Row]:
    """Makes dictionaries of a table's rows.

    Args:
        no_header: the first row is data; the columns are named "1", "2", ...
    """
    names: list[str] | None = None
    for where, cells, reason in rows:
        if names is None and cells is not None:
            counted = [str(n) for n in range(1, len(cells) + 1)]
            names = counted if no_header else column_names(path, cells)
            if not no_header:
                continue
        if names is None or cells is None:
            yield Row(where, None, reason)
        elif len(cells) != len(names):
            yield Row(where, None, f"has {len(cells)} cells, there are {len(names)} columns")
        else:
            yield Row(where, {name: cell for name, cell in zip(names, cells, strict=True) if name})


def column_names(path: Path, cells: list[Any]) -> list[str]:
    """The names in a header; "" for a column without one, which is not read.

    Raises:
        InputError: two columns have the same name.
    """
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: there are two columns named {twice[0]!r}")
    return names


def csv_cells(path: Path, lines: Iterator[str]) -> Iterator[Cells]:
    """Yields the cells of each row of a CSV file; its delimiter is told by the header."""
    csv.field_size_limit(MAX_LINE)
    first = next(lines, "")
    reader = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(first), strict=True)
    line = 0
    while True:
        where = f"{path}:{line + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "unexpected end of data" in reason:
                reason = "a quotation mark opens here and is never closed"
            yield where, None, f"not valid CSV ({reason})"
        else:
            if cells:
                yield where, list(cells), None
        line = reader.line_num


def _delimiter(header: str) -> str:
    """The character that separates the names of a header, of those that are in use."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t|", key=bare.count)


def tsv_cells(path: Path, lines: Iterator[str]) -> Iterator[Cells]:
    """Yields the cells of each line of a TSV file."""
    # A quotation mark is text here, unless it surrounds a cell: data sets such as those of CLUE
    # have single ones, which would otherwise swallow the lines that follow.
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line:
            cells = [
                cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell
                for cell in line.split("\t")
            ]
            yield f"{path}:{number}", list(cells), None
