"""What a path is, where it is not what it should be: for messages."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def not_a_file(path: str | Path, what: str = "file") -> str | None:
    """Returns why a path is not a file that can be read; None if it is one.

    Args:
        what: what is looked for, as in "no such file".
    """
    return _unlike(Path(path), "file", what, stat.S_ISREG, os.R_OK)


def not_a_folder(path: str | Path, what: str = "folder") -> str | None:
    """Returns why a path is not a folder that can be read; None if it is one."""
    return _unlike(Path(path), "folder", what, stat.S_ISDIR, os.R_OK | os.X_OK)


def not_a_file_or_folder(path: str | Path, what: str) -> str | None:
    """Returns why a path is neither a file nor a folder that can be read; None if it is one."""
    path = Path(path)
    return not_a_folder(path, what) if path.is_dir() else not_a_file(path, what)


def existing_parent(folder: str | Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = Path(folder).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def unwritable_folder(path: str | Path) -> str | None:
    """Returns why a folder cannot be made or written to; None if it seems that it can be."""
    try:
        path = Path(os.path.realpath(path))  # a link may name a folder that is to be made
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises for a loop of links, or a name that is too long
        if path.exists() and not path.is_dir():
            return "is a file; a folder is needed" if path.is_file() else not_a_folder(path)
        existing = existing_parent(path)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error).lower()
    if not existing.is_dir():
        return f"{existing} is a file; a folder is needed"
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        return f"{existing} is on a file system that is mounted read-only"
    return f"no permission to write in {existing}"


def unwritable_file(path: str | Path) -> str | None:
    """Returns why a file cannot be made or replaced; None if it seems that it can be."""
    path = Path(path)
    if path.is_dir():
        return "this is a folder; a file is needed"
    return unwritable_folder(path.parent)


def _unlike(
    path: Path, expected: str, what: str, is_expected: Callable[[int], bool], access: int
) -> str | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which does not exist"
        return f"no such {what}"
    except NotADirectoryError:
        return f"no such {what}: a file is on the way to it"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return str(reason).lower()
    if not is_expected(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        return f"this is {kind}; a {expected} is needed"
    return None if os.access(path, access) else "no permission to read it"
