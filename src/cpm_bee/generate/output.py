"""The file of answered records, of which an interruption loses none.

Records are written to `OUTPUT.partial`, a line at a time, and the file takes its own name when all
are there. `OUTPUT.partial.json`, which is written before them, holds what decides the answers:
model, delta and flags. Whatever ends generation early, also a kill, leaves both; `--resume` goes on
after the records, if they and the settings are those of the present command.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from cpm_bee import json_lines
from cpm_bee.cli import command_line
from cpm_bee.data.record_file import JsonLines, Mapped
from cpm_bee.disk import open_to_append, open_to_write, sync
from cpm_bee.errors import InputError, InterruptedRun, Problems, keeping, shown
from cpm_bee.files import exclusive, refuse_if_held
from cpm_bee.paths import unwritable_folder
from cpm_bee.progress import silence_terminal
from cpm_bee.records import ANSWER, Record, without_marks

_LOGGER = logging.getLogger(__name__)


class Output(NamedTuple):
    """An open file, and the answered records that an earlier, interrupted start wrote to it."""

    file: IO[str]
    done: Sequence[Record]


class Names(NamedTuple):
    """The files of one generation. None is hidden: a kill leaves all but the first."""

    output: Path
    partial: Path
    settings: Path
    lock: Path


def names_in_use(path: Path) -> Names:
    """The files that generation writes for the output `path`."""
    output = Path(os.path.realpath(path))  # a link stays a link, its target is replaced
    partial = output.with_name(f"{output.name}.partial")
    return Names(
        output,
        partial,
        partial.with_name(f"{partial.name}.json"),
        partial.with_name(f"{partial.name}.lock"),
    )


def check_partial(path: Path, inputs: Sequence[Record], *, resume: bool) -> None:
    """Raise what `resumable_file` would raise, as far as no model is needed to know it."""
    _refuse_unwritable(path)
    if path.exists() and not path.is_file():
        return
    names = names_in_use(path)
    refuse_if_held(names.lock, _busy(names))
    _records_done(names.partial, inputs, resume)


@contextmanager
def resumable_file(
    path: Path, inputs: Sequence[Record], settings: Mapping[str, Any], *, resume: bool
) -> Iterator[Output]:
    """A file for the answered records, which takes the name `path` when the block ends.

    Args:
        path: destination; an existing file is replaced. A device or pipe is written to directly.
        inputs: the records of which the answered ones are written, in order.
        settings: what decides the answers, by flag.
        resume: go on after the records of `path`.partial, where there are any.

    Raises:
        InputError: `path` is a folder; an interrupted generation has left records and `resume` is
            false; or what it left does not belong to `inputs` and `settings`.
        BusyError: another process is writing it.
        KeyboardInterrupt: Ctrl-C ended the block.
        InterruptedRun: another signal ended it.
    """
    _refuse_unwritable(path)
    if path.exists() and not path.is_file():
        with open_to_write(path) as file:
            yield Output(file, ())
        return
    names = names_in_use(path)
    kept = f"{names.output} itself is as before"
    with keeping(kept), exclusive(names.lock, _busy(names)), _signals_raise():
        done, length = _records_done(names.partial, inputs, resume)
        if done:
            _check_settings(names, settings)
            _LOGGER.info("resuming after %s records of %s", f"{len(done):,}", names.partial)
            os.truncate(names.partial, length)
        else:
            open_to_write(names.partial).close()
        try:
            if not done:
                _write_settings(names.settings, settings)
            with open_to_append(names.partial) as file:
                yield Output(file, done)
                sync(file, names.partial)
            os.replace(names.partial, names.output)
            names.settings.unlink(missing_ok=True)
        except BaseException:
            _keep(names, len(inputs))
            raise


def _refuse_unwritable(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a file is needed")
    if path.exists() and not path.is_file():
        return
    if reason := unwritable_folder(names_in_use(path).output.parent):
        raise InputError(f"--output {path}: {reason}")


def _busy(names: Names) -> str:
    return f"is writing {names.output}; wait for its end, or give another --output"


def _records_done(
    partial: Path, inputs: Sequence[Record], resume: bool
) -> tuple[Sequence[Record], int]:
    """The records of the whole lines of a partial file, and the bytes that these lines take.

    A kill may have cut a line after them.
    """
    if not partial.exists():
        return (), 0
    if not resume and (count := _count_lines(partial)):
        raise InputError(
            f"{partial}: holds {count:,} records of an interrupted generation\n"
            f"to go on after them: {command_line('--resume')}\n{_removal(partial)}"
        )
    lines, length = JsonLines.open(partial), 0
    with open(partial, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break
            text, reason = json_lines.decode_line(raw, None, is_first=number == 1)
            record, reason = (None, reason) if reason else json_lines.parse_line(text)
            given = inputs[number - 1] if number <= len(inputs) else None
            if reason or _without_answers(record) != _without_answers(given):
                raise InputError(
                    f"{partial}:{number}: "
                    f"{reason or 'is not the record of that number in --input'}\n"
                    f"to go on, give the input that generation began with; {_removal(partial)}"
                )
            lines.add(number, length, raw)
            length += len(raw)
    return Mapped(itemgetter(1), lines), length


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _without_answers(record: Any) -> str:
    """The text of a record with empty answers, as JSON: the order of the keys counts too."""

    def empty(node: Any) -> Any:
        return {k: empty(v) for k, v in node.items()} if isinstance(node, dict) else None

    if isinstance(record, dict) and ANSWER in record:
        record = {**without_marks(record), ANSWER: empty(record[ANSWER])}
    return json.dumps(record)


def _removal(partial: Path) -> str:
    return f"to begin anew: rm {shlex.quote(str(partial))}"


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    with open_to_write(path) as file:
        file.write(json.dumps(settings, indent=2) + "\n")
        sync(file, path)


def _check_settings(names: Names, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` with all settings that differ from those of the partial file."""
    try:
        before = json.loads(names.settings.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("a JSON object is expected")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{names.settings}: cannot be read ({error}), so that it is not known which model and "
            f"flags the records of {names.partial} are from\n{_removal(names.partial)}"
        ) from None
    problems = Problems()
    now = json.loads(json.dumps(settings))
    for flag in {**before, **now}:
        if before.get(flag) != now.get(flag):
            was, is_ = (shown(values.get(flag)) for values in (before, now))
            problems.add(str(flag), f"was {was}, now it is {is_}")
    problems.raise_if_any(
        f"{names.partial}: its records were made with other settings:",
        f"to go on, give the same as before; {_removal(names.partial)}",
    )


def _keep(names: Names, total: int) -> None:
    """Remove a partial file without records; say what another one holds."""
    count = _count_lines(names.partial) if names.partial.exists() else 0
    if count:
        _LOGGER.warning(
            "%s of %s records are in %s; to go on after them: %s",
            f"{count:,}",
            f"{total:,}",
            names.partial,
            command_line("--resume"),
        )
        return
    names.partial.unlink(missing_ok=True)
    names.settings.unlink(missing_ok=True)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or closed terminal raises; the second one ends the process at once.

    Under nohup the terminal may be closed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handled.append(signal.SIGHUP)
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGHUP:
            silence_terminal()
        # Of this type for all signals: libraries catch an `Exception` here and there.
        raise KeyboardInterrupt

    old = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    except KeyboardInterrupt as error:
        if received and received[0] != signal.SIGINT:
            raise InterruptedRun(f"ended by {signal.Signals(received[0]).name}") from error
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
