"""The input of preprocessing, in whatever form it is: files of records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from cpm_bee.data.forms import recognition
from cpm_bee.data.forms.convert import EVAL, TRAIN, convert_data
from cpm_bee.data.forms.dataset_info import describe
from cpm_bee.data.forms.names import Columns
from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.data.forms.recognition import expanded
from cpm_bee.data.forms.rows import SUFFIXES, data_files, read_rows
from cpm_bee.errors import InputError
from cpm_bee.files import temporary_folder
from cpm_bee.json_lines import check_is_lines

_TABLES = tuple(suffix for suffix in SUFFIXES if suffix not in (".json", ".jsonl"))


class RecordFiles(NamedTuple):
    """Files of records, to be preprocessed.

    Attributes:
        path: a folder of files, or one file.
        shown: what they are called in messages, by their names; empty if they are the user's own.
    """

    path: Path
    shown: dict[str, str]


def needs_conversion(inputs: Path, options: ConversionOptions) -> bool:
    """Whether data has another form than records in JSON lines, or flags ask for a conversion.

    It has not if it cannot be read: preprocessing says why.
    """
    flags = fields(ConversionOptions)
    if any(getattr(options, flag.name) != flag.default for flag in flags):
        return True
    try:
        files = sorted(inputs.glob("*.jsonl")) if inputs.is_dir() else [inputs]
        files = [f for f in files if f.is_file() and not f.name.startswith(".")]
        if not files:
            return inputs.is_dir() and bool(data_files(inputs))
        return any(map(_is_foreign, files))
    except (InputError, OSError):
        return False


def _is_foreign(file: Path) -> bool:
    if file.suffix.lower() in _TABLES:
        return True
    row = next(read_rows(file), None)
    if row is None or row.reason is not None:
        return False
    try:
        check_is_lines(file)
    except InputError:
        return True
    rows = expanded(row.value)
    form = recognition.recognise(rows[0] if rows else None, Columns(describe(file).columns))
    return form not in (None, recognition.RECORDS) or rows[:1] != [row.value]


def _unknown(inputs: Path) -> str:
    """What to say of data whose first record is no record, and of no other form; "" if it is."""
    with contextlib.suppress(InputError, OSError, StopIteration, ValueError):
        row = next(read_rows(min(inputs.glob("*.jsonl")) if inputs.is_dir() else inputs))
        columns = Columns()
        if row.reason is None and row.value and recognition.recognise(row.value, columns) is None:
            return str(recognition.unknown_form(row.where, row.value, columns))
    return ""


@contextlib.contextmanager
def record_files(
    inputs: Path, output_path: Path, options: ConversionOptions, *, seed: int, escape: bool
) -> Iterator[RecordFiles]:
    """Yields the files of records that data becomes, until the block ends; or the data itself.

    Args:
        output_path: the folder of the datasets, where converted records are kept meanwhile.
        seed, escape: see `convert_data`.

    Raises:
        InputError: as `convert_data`.
    """
    if not needs_conversion(inputs, options):
        try:
            yield RecordFiles(inputs, {})
        except InputError as error:
            if hint := _unknown(inputs):
                raise InputError(f"{error}\n{hint}") from None
            raise
        return
    files = data_files(inputs)
    with temporary_folder(output_path / f"{files[0].stem}.records") as folder:
        convert_data(inputs, folder, options, seed=seed, escape=escape)
        shown = {f"{file.stem}.jsonl": f"records of {file}" for file in files}
        if options.eval_share is not None:
            shown = {f"{n}.jsonl": f"{n} records of {inputs}" for n in (TRAIN, EVAL)}
        yield RecordFiles(folder, shown)


def dataset_names(inputs: Path, options: ConversionOptions) -> list[str]:
    """The names of the datasets that converted data becomes."""
    if options.eval_share is not None:
        return [TRAIN, EVAL]
    return [file.stem for file in data_files(inputs)]
