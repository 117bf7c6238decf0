"""The file of answered records, of which an interruption loses none.

Records are written to `OUTPUT.partial`, a line at a time, and the file takes its own name when all
are there. Whatever ends generation early, also a kill, leaves `OUTPUT.partial`; `--resume` goes on
after the records in it. They are compared with those of the input first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from cpm_bee import json_lines
from cpm_bee.errors import InputError, InterruptedRun
from cpm_bee.files import exclusive
from cpm_bee.records import ANSWER, Record

_LOGGER = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Output(NamedTuple):
    """An open file, and the answered records that an earlier, interrupted start wrote to it."""

    file: IO[str]
    done: Sequence[Record]


@contextmanager
def resumable_file(path: Path, inputs: Sequence[Record], *, resume: bool) -> Iterator[Output]:
    """A file for the answered records, which takes the name `path` when the block ends.

    Args:
        path: destination; an existing file is replaced. A device or pipe is written to directly.
        inputs: the records of which the answered ones are written, in order.
        resume: go on after the records of `path`.partial, where there are any.

    Raises:
        InputError: `path` is a folder; an interrupted generation has left records and `resume` is
            false; or what it left does not belong to `inputs`.
        BusyError: another process is writing it.
        InterruptedRun: a signal ended the block.
    """
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, a file was to be written")
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield Output(file, ())
        return
    path = path.resolve()  # a link stays a link, its target is replaced
    partial = path.with_name(f"{path.name}.partial")
    lock = path.with_name(f".{path.name}.lock")
    busy = f"is writing {path}; wait for its end, or give another --output"
    with exclusive(lock, busy), _signals_raise():
        done = _take_up(partial, inputs, resume)
        try:
            with open(partial, "a", encoding="utf-8", newline="\n") as file:
                yield Output(file, done)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            kept = _keep(partial, len(inputs))
            if isinstance(error, KeyboardInterrupt):
                raise InterruptedRun(f"interrupted{kept and f': {kept}'}") from error
            if kept:
                _LOGGER.warning(kept)
            raise


def _take_up(partial: Path, inputs: Sequence[Record], resume: bool) -> list[Record]:
    if not partial.exists() or not partial.stat().st_size:
        return []
    if not resume:
        raise InputError(
            f"{partial}: holds the records of an interrupted generation; add --resume to go on "
            "after them, or remove the file"
        )
    complete = _cut_to_whole_lines(partial)
    done: list[Record] = []
    for number, line in enumerate(complete, start=1):
        record, reason = json_lines.parse_line(line)
        given = inputs[number - 1] if number <= len(inputs) else None
        if reason or not isinstance(record, dict) or {**record, ANSWER: None} != _blank(given):
            raise InputError(
                f"{partial}:{number}: {reason or 'is not the record of that number in --input'}; "
                "give the input that generation began with, or remove the file to begin anew"
            )
        done.append(record)
    _LOGGER.info("resuming after %s records of %s", f"{len(done):,}", partial)
    return done


def _blank(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else {**record, ANSWER: None}


def _cut_to_whole_lines(partial: Path) -> list[str]:
    """The whole lines of the file; removes a last one that a kill has cut."""
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(partial, len(whole))
    return whole.decode("utf-8", "replace").split("\n")[:-1]


def _keep(partial: Path, total: int) -> str:
    """Remove a partial file without records; say what another one holds."""
    with open(partial, "rb") as file:
        count = sum(line.endswith(b"\n") for line in file)
    if not count:
        partial.unlink()
        return ""
    return (
        f"{count:,} of {total:,} records are in {partial}; add --resume to the same command to go "
        "on after them"
    )


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
