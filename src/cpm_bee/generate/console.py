"""Answers on a terminal: of one record (`--prompt`), and of records that are typed in turn."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpm_bee import json_lines, records
from cpm_bee.data.record_source import LocatedRecord, located
from cpm_bee.errors import CpmBeeError, InputError, describe
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.generate.generator import Generator, Output, growth
from cpm_bee.generate.jsonl import ChoiceOptions, answer_all, as_given
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.language import said
from cpm_bee.options import flags_of
from cpm_bee.records import ANSWER, CANDIDATES, CHOICES, CUT

HELP = """\
A line is a plain text or a record: {"input": "...", "<ans>": ""}
  :instruction TEXT    the "prompt" of records that are made from plain texts; none without TEXT
  :set FLAG VALUE      a flag of the search, such as :set beam-size 1
  :quit, Ctrl-D        end"""
_MOST_LINES = 1000  # of the history


def record_of(text: str, instruction: str | None, *, escape: bool) -> LocatedRecord:
    """A text that a user typed, as a record.

    A text that begins with a brace is a record in JSON; `"<ans>"` may be left out. Any other text
    is the `input` of a record, in which a literal `<` needs no escaping.

    Raises:
        InputError: it is not a valid record.
    """
    if text.lstrip().startswith("{"):
        value, reason = json_lines.parse_line(text)
        if isinstance(value, dict):
            value.setdefault(ANSWER, "")
        one = located("the record", value, escape=escape)
    else:
        reason = None
        value = {"input": text, **({"prompt": instruction} if instruction else {}), ANSWER: ""}
        one = located("the text", value, escape=True)
    if problems := [reason] if reason else records.validate(one.record):
        raise InputError("\n".join(problems))
    return one


class Console:
    """Answers records and prints their answers to stdout.

    Args:
        options: as they were given; `instruction` and the flags of the search can be changed.
    """

    def __init__(self, generator: Generator, options: TextGenerationOptions) -> None:
        self.generator = generator
        self.options = options

    def answer(self, text: str) -> None:
        """Print the answer of a record or of a plain text.

        Raises:
            InputError: it is not a valid record, or the vocabulary lacks one of its tokens.
        """
        options = self.options
        one = record_of(text, options.instruction, escape=options.escape)
        Prompt.of(one.record, self.generator.encoder)  # raises before anything is printed
        is_plain = options.escape or not text.lstrip().startswith("{")
        if options.stream:
            self._stream(one)
            return
        choices = ChoiceOptions.of(options)
        [result] = answer_all(
            self.generator, [one.record], [0], options, options.max_tokens, choices
        )
        for line in _lines(as_given(one.given, result, escape=is_plain), one.record):
            print(line)

    def _stream(self, one: LocatedRecord) -> None:
        """Print the texts of the answers as they are written; an answer begins a line."""
        shown: list[str] = []

        def show(output: Output, texts: Sequence[str]) -> None:
            nonlocal shown
            for number, new in growth(shown, texts):
                begins = number > 0 and (number >= len(shown) or not shown[number])
                print("\n" + new if begins else new, end="", flush=True)
            shown = list(texts)

        search = self.generator.search([one.record], self.options, max_tokens=1, on_texts=show)
        [output] = search
        print(f"\n{CUT}" if output.was_cut else "")

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a colon; returns whether to go on.

        Raises:
            InputError: there is no such command, or a value is wrong.
        """
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("quit", "q", "exit"):
            return False
        if name in ("help", "h", "?", ""):
            print(said(HELP))
        elif name == "instruction":
            self.options = replace(self.options, instruction=rest.strip() or None)
        elif name == "set":
            self.options = _changed(self.options, rest)
        else:
            raise InputError(f":{name}: there is no such command; :help lists them")
        return True


def _changed(options: TextGenerationOptions, words: str) -> TextGenerationOptions:
    """The options with a flag of the search changed; `none` takes a value back."""
    flags = {flag.flag[2:]: flag for flag in flags_of(GenerationOptions)}
    name, _, text = words.strip().replace("=", " ").partition(" ")
    name = name.removeprefix("--").replace("_", "-")
    if name not in flags or not text.strip():
        raise InputError(f":set FLAG VALUE, where FLAG is one of {', '.join(flags)}")
    flag, text = flags[name], text.strip()
    value: Any = flag.default
    if text != "none":
        try:
            value = flag.type(text) if flag.type else text
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise InputError(f"{name}: {error}") from None
    changes: dict[str, Any] = {flag.name: value}
    return replace(options, **changes)


def _lines(result: dict[str, Any], record: records.Record) -> Iterator[str]:
    """The answers of a record, for people."""
    if CHOICES in result:
        texts = records.options_of(record)
        best = result[ANSWER]
        yield f"{best} {texts[best]}" if best else "null (see --abstain-below)"
        ranked = sorted(result[CHOICES].items(), key=lambda pair: -pair[1])
        yield from (f"  {p:6.1%}  {option} {texts[option]}" for option, p in ranked)
    elif CANDIDATES in result:
        for own in result[CANDIDATES]:
            yield f"{own['score']:8.3f}  {_text(own[ANSWER])}"
    else:
        yield _text(result[ANSWER])
    if CUT in result:
        yield CUT


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def converse(console: Console) -> None:
    """Answer what is typed, line by line, until the end of input; a mistake does not end it."""
    print(f"{said(HELP)}\n")
    with _history():
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # as in a shell: drops the line
                print()
                continue
            try:
                if line.startswith(":") and not console.command(line):
                    return
                if line and not line.startswith(":"):
                    console.answer(line)
            except KeyboardInterrupt:
                print(f"\n{said('interrupted')}")
            except CpmBeeError as error:
                print(said(describe(error)), file=sys.stderr)


@contextmanager
def _history() -> Iterator[None]:
    """Lines can be edited and are remembered, as far as this machine permits."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "cpm_bee" / "history"
    readline.set_history_length(_MOST_LINES)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
