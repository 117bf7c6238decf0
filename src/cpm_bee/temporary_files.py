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


def abandoned(folder: Path) -> Iterator[Path]:
    """Yields the temporary files in a folder whose process has ended."""
    with os.scandir(folder) as entries:
        found = [(e.path, m) for e in entries if (m := _PARTIAL.fullmatch(e.name)) and e.is_file()]
    for path, match in found:
        with contextlib.suppress(OSError):  # removed by another process, or another user's
            if _is_abandoned(path, int(match[1]), is_own_host=match[2] == own_host()):
                yield Path(path)


def abandoned_bytes(folder: Path) -> int:
    """The bytes of the files in a folder that are `abandoned`: room that there will be."""
    total = 0
    with contextlib.suppress(OSError):
        for path in abandoned(folder):
            total += path.stat().st_size
    return total


def _is_abandoned(path: str, pid: int, *, is_own_host: bool) -> bool:
    """Whether nobody writes a temporary file any more; if in doubt, false.

    A lock tells more than the number of the process, which may be another one's by now. Where it
    proves nothing (a file system without locks, another machine on one whose locks are local,
    earlier versions, which took none), a file is abandoned if it has not changed for a day.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_own_host:
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        is_old = os.fstat(descriptor).st_mtime < time.time() - _DAY
        os.close(descriptor)
    return is_old and not (is_own_host and _is_running(pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True
