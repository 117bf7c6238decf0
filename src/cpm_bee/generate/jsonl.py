"""Generation for a file of records: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee import json_lines, records
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems, naming
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.output import Output, check_partial, names_in_use, resumable_file
from cpm_bee.generate.prompt import Prompt
from cpm_bee.paths import not_a_file
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, CANDIDATES, Record, without_marks
from cpm_bee.tokenizer import unescape

STANDARD = "-"  # names standard input and output


class InputRecord(NamedTuple):
    """A record as it was given, and its location, as file:line."""

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
        escape: their texts are plain; they are checked as `records.escape_texts` makes them.

    Raises:
        InputError: with all problems of all lines.
    """
    if path != STANDARD:
        if reason := not_a_file(path):
            hint = "; a pipe is read with --input -" if Path(path).is_fifo() else ""
            raise InputError(f"--input {path}: {reason}{hint}")
        json_lines.check_is_lines(Path(path))
    inputs: list[InputRecord] = []
    problems = Problems()
    name = "standard input" if path == STANDARD else path
    for number, line in _lines(path):
        value, reason = json_lines.parse_line(line)
        value = without_marks(value)
        checked = records.escape_texts(value) if escape else value
        found = [reason] if reason else records.validate(checked)
        problems.extend(f"{name}:{number}", found)
        if not found:
            inputs.append(InputRecord(f"{name}:{number}", value))
    problems.raise_if_any(
        f"{name}: {problems.count} problems, nothing was written",
        'a record is one line: {"input": "...", "<ans>": ""}, a literal < written <<'
        + (" (or give --escape)" if not escape else ""),
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


def check_output(output: str, inputs: Iterable[str | Path]) -> None:
    """Raise `InputError` if the output would replace a file that is read, also through a link."""
    if output == STANDARD:
        return
    written = names_in_use(Path(output))
    for path in inputs:
        name = "standard input" if path == STANDARD else path
        for place in written:
            if place.is_file() and _is_same_file(path, place):
                raise InputError(
                    f"--output {output}: this is the file {name} itself, which is read; its "
                    "contents would be replaced: give another --output"
                    if place == written[0]
                    else f"--output {output}: is written to {place} first, which is the file "
                    f"{name} itself, which is read: give another --output"
                )


def check_resume(output: str, inputs: Sequence[InputRecord], *, resume: bool) -> None:
    """Raise `InputError` for what an interrupted start has left, before a model is loaded.

    It is there and `resume` is false, or it does not belong to these records.
    """
    if output != STANDARD:
        check_partial(Path(output), [record for _, record in inputs], resume=resume)
    elif resume:
        raise InputError("--resume: standard output cannot be resumed, give a file as --output")


def _is_same_file(path: str | Path, other: Path) -> bool:
    try:
        stat = os.fstat(0) if path == STANDARD else os.stat(path)
        return os.path.samestat(stat, other.stat())
    except OSError:
        return False  # one of them is not there


def generate_file(
    generator: Generator,
    inputs: Sequence[InputRecord],
    options: GenerationOptions,
    output: str,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    escape: bool = False,
    max_tokens: int | None = None,
    first_number: int = 0,
    at_end: Callable[[], None] | None = None,
) -> Score:
    """Write each record with the model's answer in place of its own, one per line.

    Args:
        output: a file, named `output`.partial until it is complete; "-" is standard output.
        settings: what decides the answers, by flag; it must be the same to resume.
        resume: continue after the records that an interrupted call left in `output`.partial.
        escape: the texts are plain, and so are the answers that are written.
        max_tokens: how many tokens are held at once, see `Generator.stream`.
        first_number: the number of the first record, for its samples.
        at_end: called when all records are written, before the file takes its name.

    Raises:
        InputError: a record cannot be encoded (all are listed); or as `resumable_file`.
        InterruptedRun, KeyboardInterrupt: as `resumable_file`.
    """
    check_resume(output, inputs, resume=resume)
    given = [record for _, record in inputs]
    prompts = [records.escape_texts(record) for record in given] if escape else given
    places = [where for where, _ in inputs]
    check_vocabulary(list(map(InputRecord, places, prompts)), generator.encoder)
    with _output(output, given, settings, resume) as (file, done):
        first = first_number + len(done)
        results = generator.stream(prompts[len(done) :], options, max_tokens, first)
        correct = answered = 0
        for i, record in enumerate(progress_bar(given, description="generating", unit="records")):
            if i < len(done):
                result = done[i]
            else:
                result = next(results)
                if escape:
                    result = _as_plain(record, result)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()  # a kill loses no record
            if records.has_answer(record[ANSWER]):
                answered += 1
                correct += result[ANSWER] == record[ANSWER]
        if at_end is not None:
            at_end()
    return Score(correct, answered)


def _as_plain(record: Record, result: dict) -> dict:
    """An answered record with the plain texts of `record`, and its answers as plain texts."""
    marks = {key: value for key, value in result.items() if key not in record}
    if CANDIDATES in marks:
        marks[CANDIDATES] = [{**own, ANSWER: _unescaped(own[ANSWER])} for own in marks[CANDIDATES]]
    return {**record, ANSWER: _unescaped(result[ANSWER]), **marks}


def _unescaped(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: _unescaped(value) for key, value in answer.items()}
    return None if answer is None else unescape(answer)


def _output(
    path: str, given: Sequence[Record], settings: Mapping[str, Any], resume: bool
) -> AbstractContextManager[Output]:
    if path != STANDARD:
        return resumable_file(Path(path), given, settings, resume=resume)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    return _standard_output()


@contextlib.contextmanager
def _standard_output() -> Iterator[Output]:
    with naming("standard output"):
        yield Output(sys.stdout, ())
