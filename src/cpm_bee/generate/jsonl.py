"""Generation for a file of records: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from cpm_bee import json_lines, records
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems
from cpm_bee.generate.beam_search import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.output import Output, resumable_file
from cpm_bee.generate.prompt import Prompt
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, Record

STANDARD = "-"  # names standard input and output


class InputRecord(NamedTuple):
    """A record and its location, as file:line."""

    where: str
    record: Record


class Score(NamedTuple):
    """The number of exact matches, and of the records that came with an answer."""

    correct: int
    answered: int

    def __str__(self) -> str:
        share = self.correct / self.answered
        return f"exact match: {self.correct:,} of {self.answered:,} answers ({share:.1%})"


def read_records(path: str, *, escape: bool = False) -> list[InputRecord]:
    """Read the records of a file, or of standard input if `path` is "-".

    Args:
        escape: treat all texts as plain (see `records.escape_texts`).

    Raises:
        InputError: with the problems of all lines.
    """
    if path != STANDARD and Path(path).is_file():
        json_lines.check_is_lines(Path(path))
    inputs: list[InputRecord] = []
    problems = Problems()
    name = "standard input" if path == STANDARD else path
    for number, line in _lines(path):
        value, reason = json_lines.parse_line(line)
        value = records.escape_texts(value) if escape else value
        found = [reason] if reason else records.validate(value)
        problems.extend(f"{name}:{number}", found)
        if not found:
            inputs.append(InputRecord(f"{name}:{number}", value))
    problems.raise_if_any(
        f"{name}: {problems.count} problems, nothing was written",
        'a record is one line: {"input": "...", "<ans>": ""}, a literal < written <<',
    )
    if not inputs:
        raise InputError(f"{name}: holds no records")
    return inputs


def _lines(path: str) -> Iterator[tuple[int, str]]:
    if path != STANDARD:
        yield from json_lines.read_lines(path)
        return
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        line, reason = json_lines.decode_line(raw, None, is_first=number == 1)
        if reason:
            raise InputError(f"standard input:{number}: {reason}")
        if line:
            yield number, line


def check_vocabulary(inputs: Sequence[InputRecord], encoder: Encoder) -> None:
    """Raise `InputError` with all records that cannot be encoded with this vocabulary."""
    problems = Problems()
    for where, record in inputs:
        try:
            Prompt.of(record, encoder)
        except InputError as error:
            problems.add(where, str(error))
    problems.raise_if_any(f"{problems.count} records cannot be encoded, nothing was written")


def check_output(output: str, inputs: Iterable[str | None]) -> None:
    """Raise `InputError` if the output is one of the inputs, directly or through a link."""
    for path in inputs:
        if path not in (None, STANDARD) and output != STANDARD and _is_same_file(path, output):
            raise InputError(
                f"--output {output}: is the input file {path}, which it would replace; give "
                "another --output"
            )


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False  # one of them does not exist


def generate_file(
    generator: Generator,
    inputs: Sequence[InputRecord],
    options: GenerationOptions,
    output: str,
    *,
    resume: bool = False,
    escaped: bool = False,
) -> Score:
    """Write each record with the model's answer in place of its own, one per line.

    Args:
        output: a file, named `output`.partial until it is complete; "-" is standard output.
        resume: continue after the records that an interrupted call left in `output`.partial.
        escaped: `read_records` has escaped the texts, and they are written as plain texts again.

    Raises:
        InputError: records cannot be encoded (all are listed); or as `resumable_file`.
        InterruptedRun: a signal ended it; the records written so far are kept.
    """
    check_vocabulary(inputs, generator.encoder)
    written = records.unescape_texts if escaped else (lambda record: record)
    given = [written(record) for _, record in inputs]
    with _output(output, given, resume) as (file, done):
        correct = answered = 0
        bar = progress_bar(inputs, description="generating", unit="records")
        for i, (_, record) in enumerate(bar):
            if i < len(done):
                result = done[i]
            else:
                result = written(generator.generate(record, options))
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()  # a kill loses no record
            if records.has_answer(given[i][ANSWER]):
                answered += 1
                correct += result[ANSWER] == given[i][ANSWER]
    return Score(correct, answered)


def _output(path: str, given: Sequence[Record], resume: bool) -> AbstractContextManager[Output]:
    if path != STANDARD:
        return resumable_file(Path(path), given, resume=resume)
    if resume:
        raise InputError("--resume: standard output cannot be resumed, give a file as --output")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    return contextlib.nullcontext(Output(sys.stdout, ()))
