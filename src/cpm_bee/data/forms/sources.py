"""Data files as they are converted: their rows, their form, and what becomes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpm_bee.data.forms import recognition
from cpm_bee.data.forms.converter import MAX_LABEL_OPTIONS, Converter
from cpm_bee.data.forms.dataset_info import describe
from cpm_bee.data.forms.excel import is_excel
from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.data.forms.recognition import expanded
from cpm_bee.data.forms.rows import read_rows
from cpm_bee.data.forms.tables import Row
from cpm_bee.data.forms.transform import Transform
from cpm_bee.data.forms.values import BadRow
from cpm_bee.errors import InputError, Problems
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, Record, has_answer

_MAX_LABELS = 10_000  # more different labels are no labels


@dataclass
class Converted:
    """What became of a data file.

    Attributes:
        source: the data file.
        form: its form, see `recognition`.
        records: the number of records.
        skipped: the number of bad rows that were left out.
        unanswered: the number of records without an answer.
        first_unanswered: the place of the first of them.
        unused: the keys that no record has.
    """

    source: Path
    form: str = ""
    records: int = 0
    skipped: int = 0
    unanswered: int = 0
    first_unanswered: str = ""
    unused: set[str] = field(default_factory=set)


@dataclass
class Source:
    """A data file that is being converted."""

    file: Path
    options: ConversionOptions
    transform: Transform | None
    converter: Converter
    result: Converted

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows as they are to be converted, with the number of the row that each is made of."""
        return _rows(self.file, self.options, self.transform)

    def converted(self, problems: Problems) -> Iterator[tuple[Record, int, str]]:
        """Yields (record, number of its row, place of that); bad rows are problems."""
        bar = progress_bar(self.rows(), description=self.file.name, unit="rows", delay=2)
        for number, row in bar:
            try:
                if row.reason:
                    raise BadRow(row.reason)
                found = self.converter.convert(row.value)
            except BadRow as error:
                self.result.skipped += 1
                problems.add(row.where, str(error))
                continue
            self.converter.note_unused(row.value)
            for record in found:
                self.result.records += 1
                if not has_answer(record[ANSWER]):
                    self.result.unanswered += 1
                    self.result.first_unanswered = self.result.first_unanswered or row.where
                yield record, number, row.where
        self.result.unused = self.converter.unused


def open_sources(
    files: list[Path],
    options: ConversionOptions,
    transform: Transform | None,
    escape: bool,
    problems: Problems,
) -> list[Source]:
    """Recognise the files by their first rows, and read the labels of classifications.

    Args:
        escape: the texts of data that are records already are plain.

    Raises:
        InputError: lists what is wrong with files as a whole.
    """
    if options.sheet is not None and not any(is_excel(file) for file in files):
        raise InputError(f"--sheet {options.sheet}: only Excel files have sheets (.xlsx)")
    found: list[Source] = []
    for file in files:
        with problems.collecting():
            description = describe(file)
            rows = _rows(file, options, transform)
            first = next((r for _, r in rows if not r.reason), None)
            if first is None:
                before = problems.count
                for _, row in _rows(file, options, transform):
                    problems.add(row.where, row.reason or "")
                if problems.count == before:
                    problems.add(str(file), "holds no rows")
                continue
            converter = Converter(
                first.where,
                first.value,
                options,
                columns=description.columns,
                tags=description.tags,
                form=description.form,
                escape=escape,
            )
            result = Converted(file, converter.form)
            found.append(Source(file, options, transform, converter, result))
    problems.raise_if_any("nothing was written:")
    _name_labels([s for s in found if s.converter.labels is None])
    return found


def _name_labels(sources: list[Source]) -> None:
    """Give all classifications the labels that are in any of them, so that their options agree."""
    sources = [s for s in sources if s.converter.form == recognition.CLASSIFICATION]
    labels: set[str] = set()
    for source in sources:
        for _, row in source.rows():
            with contextlib.suppress(BadRow):  # it will be a problem when it is converted
                if isinstance(row.value, dict) and (label := source.converter.label(row.value)):
                    labels.add(label)
            if len(labels) > _MAX_LABELS:
                break
    for source in sources:
        source.converter.labels = sorted(labels) if 2 <= len(labels) <= MAX_LABEL_OPTIONS else []


def _rows(
    file: Path, options: ConversionOptions, transform: Transform | None
) -> Iterator[tuple[int, Row]]:
    """The rows of a file after the user's transform, with the number of the row as it was read."""
    rows = read_rows(
        file, encoding=options.encoding, no_header=options.no_header, sheet=options.sheet
    )
    for number, row in enumerate(rows):
        values, reason = [row.value], row.reason
        if reason is None and transform is not None:
            try:
                values = transform(row.value)
            except BadRow as error:
                values, reason = [None], str(error)
        for value in values:
            for part in [value] if reason else expanded(value):
                yield number, Row(row.where, part, reason)
