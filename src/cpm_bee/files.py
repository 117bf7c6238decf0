"""Atomic writes of files and folders, and lock files.

Everything is written under a temporary name beside its destination (a rename is atomic only
within one file system), synced to disk, and renamed. POSIX only.

What a killed process has left is removed when another one begins to write beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cpm_bee.disk import failure_of, open_to_write, sync
from cpm_bee.errors import InputError, naming
from cpm_bee.temporary_files import remove_abandoned, temporary_name

# Of a lock that is held, 0.05 s apart: a dry run looks at it for a moment, and its holder needs one
# to write its name into it.
_TRIES = 5
_LFS_POINTER = b"version https://git-lfs."


class BusyError(InputError):
    """Another process is writing the same folder."""


def is_usable_name(name: str) -> bool:
    """Whether the file system can look up a path that was read from a file."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return b"\0" not in b"".join(parts) and max(map(len, parts)) <= 255 and len(name) <= 1024


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise `InputError` if `path` is a Git LFS pointer, whose file was not downloaded."""
    with open(path, "rb") as file:
        begin = file.read(len(_LFS_POINTER))
    if begin == _LFS_POINTER:
        raise InputError(
            f"{path}: is a Git LFS pointer, the file itself was not downloaded; run git lfs pull "
            "in its folder (or download the file again)"
        )


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears at `path` only if the block ends without exception.

    Args:
        path: the destination. Missing parent folders are made and an existing file is replaced; a
            device or pipe (`/dev/stdout`) is written to directly.
        mode: "w" (UTF-8, lines end with "\\n") or "wb".

    Raises:
        InputError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, expected a file")
    if path.exists() and not path.is_file():
        with open_to_write(path, mode) as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # replaces the target of a link, not the link
    with _parent_folders(path):
        remove_abandoned(path.parent)
        temporary, file = _open_temporary(path, mode)
        try:
            yield file
            sync(file, path)
            # Before it is closed, and so unlocked: an unlocked file is removed by other processes.
            os.replace(temporary, path)
            file.close()
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.close()
            failure = failure_of(file)
            if failure is not None and failure is not error:
                raise failure from None  # torch.save raises a RuntimeError for it
            raise
    _sync(path.parent)


def _open_temporary(path: Path, mode: str) -> tuple[Path, IO[Any]]:
    """Open the temporary file of a destination, locked until it is closed."""
    temporary = path.with_name(temporary_name(path.name))
    while True:
        file = open_to_write(temporary, mode, shown=path)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # removed by another process between our opening and locking


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Make an empty folder that is moved to `path` if the block ends without exception.

    Leftovers of a killed run are removed first; if it was replacing a folder, the old one is
    restored.

    Args:
        path: the destination; missing parent folders are made.
        replace: replace an existing folder once the new one is complete.

    Raises:
        InputError: `path` exists and `replace` is false, or `path` is a file.
        BusyError: another process is writing it.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    with _parent_folders(path):
        lock = _claim(temporary, path)
        try:
            if old.exists() and not path.exists():
                os.rename(old, path)  # killed between the two renames below
            shutil.rmtree(old, ignore_errors=True)
            if path.exists() and not (replace and path.is_dir()):
                raise InputError(f"{path}: already exists")
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                os.rename(old, path)
            _name_final(error, temporary, path)
            raise
        finally:
            os.close(lock)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Make an empty folder beside `path` for the block; one that a killed run has left is replaced.

    Raises:
        BusyError: another process has it.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.partial")
    with _parent_folders(path):
        lock = _claim(temporary, path)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _name_final(error: BaseException, temporary: Path, path: Path) -> None:
    """Have an `OSError` name the file that could not be written, not its temporary name."""
    if isinstance(error, OSError) and isinstance(error.filename, (str, Path)):
        with contextlib.suppress(ValueError):
            error.filename = str(path / Path(error.filename).relative_to(temporary))


def _claim(temporary: Path, path: Path) -> int:
    """Make the temporary folder, empty and locked; returns the descriptor that holds the lock.

    The lock tells the folder of a running process from the leftovers of a killed one: the kernel
    releases it when a process is killed.
    """
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have renamed or removed the folder between our opening and locking.
        ours = temporary.exists() and os.path.samestat(os.fstat(lock), temporary.stat())
    except BlockingIOError:
        ours = False
    except OSError:
        ours = True  # a file system without locks
    if not ours:
        os.close(lock)
        raise BusyError(f"{path}: another process is writing it right now")
    for entry in temporary.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return lock


_held: set[Path] = set()  # the lock files of this process


@contextlib.contextmanager
def exclusive(path: str | Path, busy: str) -> Iterator[None]:
    """Hold a lock file for the block; the kernel releases the lock of a killed process.

    Args:
        path: the lock file, which is removed at the end.
        busy: for the message, what the other process is doing and what to do about it.

    Raises:
        BusyError: another process holds the lock; the message has its id and machine.
    """
    path = Path(path)
    with _parent_folders(path):
        descriptor = _lock(path, busy)
        _held.add(path)
        try:
            with contextlib.suppress(OSError):  # a full disk: only the message will lack it
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            _held.discard(path)
            os.close(descriptor)


def remove_lock_files() -> None:
    """Remove the files of all locks that this process holds; for one that ends by `os._exit`."""
    for path in tuple(_held):
        path.unlink(missing_ok=True)


def refuse_if_held(path: str | Path, busy: str) -> None:
    """Raise `BusyError` if another process holds the lock file; neither makes nor keeps the lock.

    For a dry run. Whoever takes the lock at this very moment tries again (`_TRIES`).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{_holder(descriptor)} {busy}") from None
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 300, 0).decode("utf-8", "replace") or "another process"


def _lock(path: Path, busy: str) -> int:
    tries = _TRIES
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            tries -= 1
            if tries:
                time.sleep(0.05)
                continue
            raise BusyError(f"{holder} {busy}") from None
        except OSError:
            return descriptor  # a file system without locks
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # the holder removed the file after we opened it


@contextlib.contextmanager
def _parent_folders(path: Path) -> Iterator[None]:
    """Make the folders above `path`; after an exception, remove those it made if empty."""
    parent = Path(os.path.realpath(path.parent))  # it may be a link to a folder that is to be made
    made = [f for f in (parent, *parent.parents) if not f.exists()]  # innermost first
    parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(directory, name))
        _sync(directory)
