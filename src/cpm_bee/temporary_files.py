"""Names of temporary files, and which of them a killed process has left.

A name ends with the process and the machine, and the file is locked while it is written: the kernel
releases the lock of a process that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.partial-(\d+)(?:-(.+))?", re.DOTALL)
_DAY = 86400.0


def temporary_name(name: str) -> str:
    """The name of this process's temporary file beside a file of this name."""
    encoded = os.fsencode(name)
    if len(encoded) > 150:  # a file name may have 255 bytes
        encoded = encoded[:130] + hashlib.sha256(encoded).hexdigest()[:16].encode()
    return f".{os.fsdecode(encoded)}.partial-{os.getpid()}-{own_host()}"


def own_host() -> str:
    """The name of this machine, as in names of temporary files."""
    return re.sub(r"[^\w.]", "_", socket.gethostname(), flags=re.ASCII)[:32]


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in a folder whose process has ended."""
    for path, owner in _temporary_files(folder):
        with contextlib.suppress(OSError), _examined(path, owner) as is_abandoned:
            if is_abandoned:
                os.unlink(path)


def abandoned_bytes(folder: Path) -> int:
    """The bytes of the files that `remove_abandoned` would remove."""
    total = 0
    for path, owner in _temporary_files(folder):
        with contextlib.suppress(OSError), _examined(path, owner) as is_abandoned:
            total += os.stat(path).st_size if is_abandoned else 0
    return total


def _temporary_files(folder: Path) -> list[tuple[str, re.Match[str]]]:
    with os.scandir(folder) as entries:
        found = [(e, _PARTIAL.fullmatch(e.name)) for e in entries]
        return [(e.path, m) for e, m in found if m and e.is_file(follow_symlinks=False)]


@contextlib.contextmanager
def _examined(path: str, owner: re.Match[str]) -> Iterator[bool]:
    """Yields whether nobody writes a temporary file any more; if in doubt, false.

    Its lock is held for the block: a process that has just made it and waits for the lock sees that
    it has been removed, and makes another one.

    A lock tells more than the number of the process, which may be another one's by now. Where it
    proves nothing (a file system without locks, another machine on one whose locks are local,
    earlier versions, which took none), a file is abandoned if it has not changed for a day.

    Raises:
        OSError: it has been removed, or is another user's.
    """
    is_own_host = owner[2] == own_host()
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            yield False
            return
        except OSError:
            is_locked = False
        stat = os.fstat(descriptor)
        if not os.path.samestat(stat, os.stat(path, follow_symlinks=False)):
            yield False  # it has got its final name, and there is another one
            return
        is_old = stat.st_mtime < time.time() - _DAY
        is_running = is_own_host and not is_locked and _is_running(int(owner[1]))
        yield (is_locked and is_own_host) or (is_old and not is_running)
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True
