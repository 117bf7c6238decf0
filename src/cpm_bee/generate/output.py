"""The output file of answered records. An interruption loses none of them.

Records are written to `OUTPUT.partial`, one line at a time, and the file is renamed when it is
complete. If generation ends early, even by a kill, `OUTPUT.partial` keeps its records. `--resume`
compares them with those of the input and continues after them.
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
    """An open file, and the answered records that an interrupted run has already written to it."""

    file: IO[str]
    done: Sequence[Record]


@contextmanager
def resumable_file(path: Path, inputs: Sequence[Record], *, resume: bool) -> Iterator[Output]:
    """Open a file for the answered records, and rename it to `path` when the block ends.

    Args:
        path: destination; an existing file is replaced. A device or pipe is written to directly.
        inputs: the records to answer, in the order of the output.
        resume: continue after the records in `path`.partial, if there are any.

    Raises:
        InputError: `path` is a folder; an interrupted run has left records but `resume` is false;
            or the records that it left do not match `inputs`.
        BusyError: another process is writing it.
        InterruptedRun: a signal ended the block.
    """
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a file is needed")
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield Output(file, ())
        return
    path = path.resolve()  # a link stays a link, its target is replaced
    partial = path.with_name(f"{path.name}.partial")
    lock = path.with_name(f".{path.name}.lock")
    busy = f"is writing {path}; wait for it to end, or give another --output"
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
            f"{partial}: holds the records of an interrupted generation; add --resume to continue "
            "after them, or remove the file"
        )
    complete = _cut_to_whole_lines(partial)
    done: list[Record] = []
    for number, line in enumerate(complete, start=1):
        record, reason = json_lines.parse_line(line)
        given = inputs[number - 1] if number <= len(inputs) else None
        if reason or not isinstance(record, dict) or {**record, ANSWER: None} != _blank(given):
            raise InputError(
                f"{partial}:{number}: {reason or f'does not match record {number} of --input'}; "
                "give the same --input as before, or remove the file to start again"
            )
        done.append(record)
    _LOGGER.info("resuming after %s records of %s", f"{len(done):,}", partial)
    return done


def _blank(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else {**record, ANSWER: None}


def _cut_to_whole_lines(partial: Path) -> list[str]:
    """Returns the complete lines of the file, and removes a last one that a kill cut short."""
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(partial, len(whole))
    return whole.decode("utf-8", "replace").split("\n")[:-1]


def _keep(partial: Path, total: int) -> str:
    """Remove a partial file without records; returns a sentence about one with records."""
    with open(partial, "rb") as file:
        count = sum(line.endswith(b"\n") for line in file)
    if not count:
        partial.unlink()
        return ""
    return (
        f"{count:,} of {total:,} records are in {partial}; add --resume to the same command to "
        "continue after them"
    )


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Make SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
