"""Writing to a disk that may be full.

An `OSError` of a write has no file name, and libraries may replace it by an error of their own
(torch.save does). A `NamedFile` gives it the name, and remembers it.

Nothing is written through a memory map: where the disk is full, that ends the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import IO, Any

from cpm_bee.errors import naming
from cpm_bee.paths import existing_parent


class NamedFile(io.FileIO):
    """An unbuffered file whose errors of writing have a file name.

    Args:
        path: the file.
        mode: as in `io.FileIO`.
        shown: the name for messages, where `path` is a temporary one.

    Attributes:
        failure: the first error of writing; a library may have raised another one instead.
    """

    def __init__(self, path: str | Path | int, mode: str, shown: str | Path | None = None) -> None:
        super().__init__(path, mode)
        self._shown = path if shown is None else shown
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            with naming(self._shown):
                return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def open_to_write(
    path: str | Path | int, mode: str = "w", shown: str | Path | None = None
) -> IO[Any]:
    """Open a file for writing, buffered; an error of writing has its name.

    Args:
        path: the file, or a descriptor.
        mode: "w", "a" or "x" (UTF-8, lines end with "\\n"); "wb", "ab" or "xb"; or "r+b".
        shown: the name for messages, where `path` is a temporary one.
    """
    raw = NamedFile(path, mode.replace("b", ""), shown)
    if "b" in mode:
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", newline="\n")


class _Unbuffered(io.BufferedIOBase):
    """Passes on at once what is written.

    Hazard: where a signal handler raises within a write, a buffer keeps what has been written, and
    writes it again when it is closed.
    """

    def __init__(self, raw: NamedFile) -> None:
        self.raw = raw

    def write(self, data: Any) -> int:
        append(self.raw, data)
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()
        super().close()


def open_to_append(path: str | Path) -> IO[str]:
    """Open a text file to append to, without a buffer: each `write` is whole, and happens once.

    It is so even if a signal handler raises; a line that this cuts short has no end.
    """
    buffer: Any = _Unbuffered(NamedFile(path, "a"))
    return io.TextIOWrapper(buffer, encoding="utf-8", newline="\n", write_through=True)


def failure_of(file: IO[Any]) -> OSError | None:
    """The first error of writing a file of `open_to_write`, whatever was raised instead."""
    buffered = getattr(file, "buffer", file)
    raw = getattr(buffered, "raw", None)
    return raw.failure if isinstance(raw, NamedFile) else None


def append(file: NamedFile, data: bytes) -> None:
    """Append to a file; if that fails, nothing is appended, so that no line is cut short."""
    end = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def sync(file: IO[Any], shown: str | Path) -> None:
    """Flush a file and have its contents written to the disk."""
    file.flush()
    with naming(shown):
        os.fsync(file.fileno())


def shown_bytes(count: float) -> str:
    """A number of bytes for people: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_space(folder: str | Path) -> int:
    """The bytes that are free for this user where a folder is, or would be made."""
    return shutil.disk_usage(existing_parent(folder)).free


def shortage(folder: str | Path, needed: float, what: str) -> str | None:
    """Returns what is short where a folder is, or would be made; None if there is room.

    Args:
        needed: bytes that will be written at once, in addition to what is there.
        what: what takes the space.
    """
    free = free_space(folder)
    if needed <= free:
        return None
    return (
        f"no space left on device: {what} will take {shown_bytes(needed)}, but only "
        f"{shown_bytes(free)} are free there"
    )
