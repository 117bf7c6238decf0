"""Reads the rows of data files: JSON lines, JSON arrays, CSV, TSV, Excel, Parquet.

A row is whatever JSON value stands there, or a dictionary of a table's cells by column. Files are
streamed: one row (of Parquet: one batch of rows) is in memory at a time.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cpm_bee.data.forms.excel import excel_rows, is_excel
from cpm_bee.data.forms.json_values import json_values
from cpm_bee.data.forms.tables import EXTRA, Row, csv_cells, named_cells, tsv_cells
from cpm_bee.errors import InputError
from cpm_bee.json_lines import MAX_LINE, parse_line, probable_encoding
from cpm_bee.paths import not_a_file, not_a_file_or_folder

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
DATASET_INFO = "dataset_info.json"  # of LLaMA-Factory; describes data and is none
_BATCH = 256  # rows of a Parquet file
_PIECE = 1 << 20  # characters of a JSON array that are read at once
_HEAD = 1 << 16  # bytes by which an encoding is recognised


def data_files(path: Path) -> list[Path]:
    """The data files of a folder, or the one file.

    Raises:
        InputError: there are none, the file is of no known kind, or two would have one result.
    """
    if path.is_dir() and not_a_file_or_folder(path, "folder") is None:
        found = sorted(
            p
            for p in path.iterdir()
            if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        found = [p for p in found if p.name != DATASET_INFO]
        if not found:
            raise InputError(f"{path}: looked for {_listed()} files, found none")
        for _, same in itertools.groupby(sorted(found, key=lambda p: p.stem), lambda p: p.stem):
            names = [p.name for p in same]
            if len(names) > 1:
                raise InputError(
                    f"{path}: {' and '.join(names)} would have the same result; rename one, or "
                    "give one of them as --input"
                )
        return found
    if reason := not_a_file_or_folder(path, "file or folder"):
        raise InputError(f"{path}: {reason}; expected {_listed()} files")
    if path.suffix.lower() == ".xls":
        raise InputError(f"{path}: the old Excel format; save it as .xlsx")
    return [path]


def _listed() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def read_rows(
    path: Path,
    *,
    encoding: str | None = None,
    no_header: bool = False,
    sheet: str | None = None,
) -> Iterator[Row]:
    """Yields the rows of a file, by its suffix; one of another suffix is JSON.

    Args:
        encoding: of a text file; None is UTF-8, with or without a byte order mark.
        no_header: the first row of a table is data; its columns are named "1", "2", ...
        sheet: of an Excel file; None is all that are not empty.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    if reason := not_a_file(path):
        raise InputError(f"{path}: {reason}")
    suffix = path.suffix.lower()
    if is_excel(path):
        yield from excel_rows(path, no_header=no_header, sheet=sheet)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in (".csv", ".tsv"):
        lines = text_lines(path, encoding)
        cells = csv_cells(path, lines) if suffix == ".csv" else tsv_cells(path, lines)
        yield from named_cells(path, cells, no_header)
    elif _is_json_lines(path, encoding):
        for number, line in enumerate(text_lines(path, encoding), start=1):
            if not line.isspace():
                yield Row(f"{path}:{number}", *_parsed(line))
    else:
        for begin, value, reason in json_values(path, _text_pieces(path, encoding)):
            yield Row(f"{path}:{begin}", value, reason)


def _parsed(line: str) -> tuple[Any, str | None]:
    if len(line) > MAX_LINE:
        return None, f"has {len(line)} characters; a line may have up to {MAX_LINE}"
    if "\0" in line:
        return None, "holds NUL characters, so it is not text"
    return parse_line(line.strip("\r\n"))


def text_lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Yields the lines of a text file with their ends, without a byte order mark.

    Raises:
        InputError: the text is of another encoding; the message names the probable one.
    """
    with open(path, "rb") as raw:
        if encoding is not None:
            yield from _decoded(path, raw, encoding)
            return
        for number, line in enumerate(raw, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_text(f"{path}:{number}", "UTF-8", line, error) from None


def _text_pieces(path: Path, encoding: str | None) -> Iterator[str]:
    """Yields the text of a file in pieces, since an array may be one line of any length."""
    with open(path, "rb") as raw:
        yield from _decoded(path, raw, encoding or "utf-8", _PIECE)


def _decoded(path: Path, raw: IO[bytes], encoding: str, size: int = -1) -> Iterator[str]:
    """Yields the lines of a file or, given a size, pieces of so many characters."""
    text = io.TextIOWrapper(raw, encoding, newline="\n")
    count = 0
    try:
        while piece := text.readline() if size < 0 else text.read(size):
            yield piece if count else piece.removeprefix("\ufeff")
            count += piece.count("\n")
    except UnicodeError as error:
        with open(path, "rb") as file:
            head = file.read(_HEAD).rpartition(b"\n")[0]
        raise _not_text(f"{path}: after line {count}", encoding, head, error) from None


def _not_text(where: str, encoding: str, raw: bytes, error: UnicodeError) -> InputError:
    name = probable_encoding(raw)
    known = name is not None and codecs.lookup(name) != codecs.lookup(encoding)
    hint = (
        f"it looks like {name}: --encoding {str(name).lower()}"
        if known
        else "give another --encoding"
    )
    return InputError(f"{where}: not {encoding} text ({getattr(error, 'reason', error)}); {hint}")


def _is_json_lines(path: Path, encoding: str | None) -> bool:
    """Whether a JSON file has one value a line, by its first lines that are not blank."""
    head = next(_text_pieces(path, encoding), "").lstrip()
    first, _, rest = head.partition("\n")
    is_value = parse_line(first)[1] is None
    if head.startswith("["):
        # An array of one line, or the first of several lines that are arrays.
        return is_value and bool(rest.strip())
    # The first line may be longer than what was read, or a bad one.
    return (
        is_value or not rest or rest.lstrip().startswith("{") or first.rstrip() not in ("{", "{}")
    )


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: {EXTRA.format('pyarrow')}") from None
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", value)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a Parquet file that can be read ({reason})") from None


def json_kind(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        inner = f" of {json_kind(value[0])}" if value else ""
        return f"a list of {len(value)}{inner.replace(' of a ', ' of ') if inner else ''}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(json.dumps, list(value)[:4]))}"
    if value is None:
        return "null"
    return (
        "true or false"
        if isinstance(value, bool)
        else "a number"
        if isinstance(value, (int, float))
        else type(value).__name__
    )
