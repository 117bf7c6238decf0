"""Generation for a file of records: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee import records
from cpm_bee.data.record_file import STANDARD, Mapped
from cpm_bee.data.record_source import LocatedRecord
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems, naming
from cpm_bee.generate.choices import choose, has_choices
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.output import Output, check_partial, names_in_use, resumable_file
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.scoring import MAX_TOKENS
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, CANDIDATES, CHOICES, MARKS, Record
from cpm_bee.tokenizer import unescape

# Records that are chosen together; they wait for each other before they are written.
_BLOCK = 256


class Score(NamedTuple):
    """The number of exact matches, and of the records that came with an answer.

    Attributes:
        abstained: records whose options were all less probable than `abstain_below`.
    """

    correct: int = 0
    answered: int = 0
    abstained: int = 0

    def counted(self, given: Record, result: dict) -> Score:
        """Returns the numbers with one more record, as it was given and as it was answered."""
        answered = records.has_answer(given[ANSWER])
        return Score(
            self.correct + (answered and result[ANSWER] == given[ANSWER]),
            self.answered + answered,
            self.abstained + (CHOICES in result and result[ANSWER] is None),
        )

    def lines(self) -> list[str]:
        """What there is to say, for people."""
        lines = []
        if self.abstained:
            lines.append(f"abstained: {self.abstained:,} records (see --abstain-below)")
        if self.answered:
            share = self.correct / self.answered
            lines.append(
                f"exact match: {self.correct:,} of {self.answered:,} answers ({share:.1%})"
            )
        return lines


class ChoiceOptions(NamedTuple):
    """How records with options are answered, instead of being generated.

    Attributes:
        orders: the number of orders of the options that are averaged.
        abstain_below: the answer is None if no option is at least so probable.
        seed: of the orders.
    """

    orders: int = 1
    abstain_below: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, options: TextGenerationOptions) -> ChoiceOptions | None:
        """Those of the flags; None without `--choices`."""
        if options.choices is None:
            return None
        return cls(options.choices, options.abstain_below or 0.0, options.seed)


@dataclass(frozen=True)
class FileOptions:
    """How the records of a file are answered.

    Attributes:
        generation: how answers are searched or drawn.
        settings: what decides the answers, by flag; it must be the same to resume.
        resume: continue after the records that an interrupted call left in `output`.partial.
        escape: the given texts are plain, and so are the answers that are written.
        max_tokens: how many tokens are held at once, see `Generator.stream`.
        choices: answer the records with options by these; see `answer_all`.
    """

    generation: GenerationOptions
    settings: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    escape: bool = False
    max_tokens: int | None = None
    choices: ChoiceOptions | None = None

    @classmethod
    def of(cls, options: TextGenerationOptions, settings: Mapping[str, Any]) -> FileOptions:
        """Those of the flags."""
        choices = ChoiceOptions.of(options)
        return cls(options, settings, options.resume, options.escape, options.max_tokens, choices)


_given, _record = attrgetter("given"), attrgetter("record")


def check_vocabulary(inputs: Sequence[LocatedRecord], encoder: Encoder) -> None:
    """Raise `InputError` with all records that cannot be encoded with this vocabulary."""
    problems = Problems()
    for one in inputs:
        try:
            Prompt.of(one.record, encoder)
        except InputError as error:
            problems.add(one.where, str(error))
    problems.raise_if_any(f"{problems.count} records cannot be encoded, nothing was written")


def check_choices(inputs: Sequence[LocatedRecord]) -> None:
    """Raise `InputError` if `--choices` would have no effect on any record."""
    if not any(has_choices(one.record) for one in inputs):
        raise InputError(
            f"--choices: none of the {len(inputs):,} records has options to choose from "
            '({"<option_0>": "...", "<option_1>": "..."} in a field, and one text as its '
            '"<ans>"); leave the flag out'
        )


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


def check_resume(output: str, inputs: Sequence[LocatedRecord], *, resume: bool) -> None:
    """Raise `InputError` for what an interrupted start has left, before a model is loaded.

    It is there and `resume` is false, or it does not belong to these records.
    """
    if output != STANDARD:
        check_partial(Path(output), Mapped(_given, inputs), resume=resume)
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
    inputs: Sequence[LocatedRecord],
    output: str,
    options: FileOptions,
    *,
    first_number: int = 0,
    at_end: Callable[[], None] | None = None,
) -> Score:
    """Write each record as it was given with the model's answer in place of its own, one per line.

    Args:
        output: a file, named `output`.partial until it is complete; "-" is standard output.
        first_number: the number of the first record, for its samples.
        at_end: called when all records are written, before the file takes its name.

    Raises:
        InputError: a record cannot be encoded (all are listed); or as `resumable_file`.
        InterruptedRun, KeyboardInterrupt: as `resumable_file`.
    """
    check_resume(output, inputs, resume=options.resume)
    given = Mapped(_given, inputs)
    check_vocabulary(inputs, generator.encoder)
    with _output(output, given, options) as (file, done):
        rest = Mapped(_record, inputs[len(done) :])
        numbers = range(first_number + len(done), first_number + len(inputs))
        results = answer_all(
            generator, rest, numbers, options.generation, options.max_tokens, options.choices
        )
        score = Score()
        for i, record in enumerate(progress_bar(given, description="generating", unit="records")):
            if i < len(done):
                result = done[i]
            else:
                result = as_given(record, next(results), escape=options.escape)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()  # a kill loses no record
            score = score.counted(record, result)
        if at_end is not None:
            at_end()
    return score


def answer_all(
    generator: Generator,
    prompts: Sequence[Record],
    numbers: Sequence[int],
    options: GenerationOptions,
    max_tokens: int | None = None,
    choices: ChoiceOptions | None = None,
) -> Iterator[dict]:
    """Yields a copy of each record, in order, with the model's answer; see `Output.filled`.

    With `choices`, the answer of a record with options is the most probable one, or None, and the
    probabilities of all are under `CHOICES`; the others (see `has_choices`) are generated.

    Args:
        numbers: of the records, on which samples and orders of options depend.
        max_tokens: see `Generator.stream`.
    """
    if choices is None:
        yield from generator.stream(prompts, options, max_tokens, numbers)
        return
    for begin in range(0, len(prompts), _BLOCK):
        block = prompts[begin : begin + _BLOCK]
        own_numbers = numbers[begin : begin + _BLOCK]
        found = choose(
            generator.model,
            generator.encoder,
            block,
            numbers=own_numbers,
            max_tokens=max_tokens or min(MAX_TOKENS, generator.default_max_tokens()),
            orders=choices.orders,
            seed=choices.seed,
            quiet=True,
        )
        others = [i for i, choice in enumerate(found) if choice is None]
        generated = generator.stream(
            [block[i] for i in others], options, max_tokens, [own_numbers[i] for i in others]
        )
        for record, choice in zip(block, found, strict=True):
            if choice is None:
                yield next(generated)
                continue
            p = choice.probabilities
            answer = choice.best if p[choice.best] >= choices.abstain_below else None
            yield {**record, ANSWER: answer, CHOICES: p}


def as_given(given: dict[str, Any], result: dict, *, escape: bool) -> dict:
    """An answered record in the form in which it was given.

    Args:
        given: the record as it was read, with the fields that the model does not see.
        escape: its texts are plain, and so are the answers to be.
    """
    plain = _unescaped if escape else (lambda answer: answer)
    marks = {key: result[key] for key in MARKS if key in result}
    if CANDIDATES in marks:
        marks[CANDIDATES] = [{**own, ANSWER: plain(own[ANSWER])} for own in marks[CANDIDATES]]
    return {**given, ANSWER: plain(result[ANSWER]), **marks}


def _unescaped(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: _unescaped(value) for key, value in answer.items()}
    return None if answer is None else unescape(answer)


def _output(
    path: str, given: Sequence[Record], options: FileOptions
) -> AbstractContextManager[Output]:
    if path != STANDARD:
        return resumable_file(Path(path), given, options.settings, resume=options.resume)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    return _standard_output()


@contextlib.contextmanager
def _standard_output() -> Iterator[Output]:
    with naming("standard output"):
        yield Output(sys.stdout, ())
