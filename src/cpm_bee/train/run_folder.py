"""Where a run writes, and how it replaces an earlier run of the same name.

Until a new run has saved its first state, it writes to a separate folder, `.NAME-new/`: a run that
fails to start leaves the earlier run in place. Then these renames follow:

    .NAME-incoming/ is made
    .NAME-new/ becomes .NAME-ready/: from here on the new run is the current one
    the earlier run's files go into .NAME-incoming/
    NAME-previous/ becomes NAME-previous-2/, and so on, the last of them first
    .NAME-incoming/ becomes NAME-previous/
    the files in .NAME-ready/ get their final names

After a kill at any point, the existing folders show which step is next, and the next run finishes
them. Only then are surplus earlier runs removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from cpm_bee.temporary_files import abandoned_bytes

_LOG_END = 1 << 16  # bytes at the end of a log that contain its last line


class RunFolder:
    """The files `SAVE/SAVE_NAME-...` of a run, and the folders of earlier ones.

    Args:
        endings: the endings of the files that a run may write; each follows the name. A run may
            also write numbered states (`numbered_state`).
        keep_runs: the number of finished earlier runs to keep.
    """

    def __init__(self, folder: Path, name: str, endings: list[str], keep_runs: int) -> None:
        self._folder = folder
        self._name = name
        self._endings = endings
        self._keep_runs = keep_runs
        self._new, self._ready, self._incoming, self._dropped = (
            folder / f".{name}-{part}" for part in ("new", "ready", "incoming", "dropped")
        )
        self._is_staged = False
        self.previous = folder / f"{name}-previous"

    def present(self) -> list[Path]:
        """Returns the files that a run of this name has left in the folder."""
        return self._own_files(self._folder)

    def current(self) -> list[Path]:
        """Returns the files of the current run, even if a kill interrupted the renames."""
        ready = self._own_files(self._ready)
        if self._ready.is_dir() and self._incoming.is_dir():
            return ready  # those that are left in the folder belong to the earlier run
        return ready + self.present()

    def numbered_state(self, step: int) -> str:
        """Returns the name of a state that is not the newest one."""
        return f"{self._name}-state-{step}.pt"

    def numbered_states(self, files: Iterable[Path]) -> list[tuple[int, Path]]:
        """Returns those of the files that are numbered states, with their steps, newest first."""
        found = [(match, path) for path in files if (match := self._numbered_state(path))]
        return sorted(((int(match[1]), path) for match, path in found), reverse=True)

    def _numbered_state(self, path: Path) -> re.Match[str] | None:
        return re.fullmatch(re.escape(self._name) + r"-state-(0|[1-9]\d{0,17})\.pt", path.name)

    def _own_files(self, folder: Path) -> list[Path]:
        names = {f"{self._name}{ending}" for ending in self._endings}
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return [p for p in files if (p.name in names or self._numbered_state(p)) and p.is_file()]

    def to_write(self, path: Path) -> Path:
        """Returns where to write a file of this run now."""
        return self._new / path.name if self._is_staged else path

    def begin(self) -> None:
        """Begin a new run, which leaves an earlier one in place until `take_place`."""
        self.finish()
        if self.present():
            self._new.mkdir()
            self._is_staged = True

    def take_place(self) -> Path | None:
        """Give this run's files their final names; returns the folder of the previous run."""
        if not self._is_staged:
            return None
        self._incoming.mkdir()
        self._new.rename(self._ready)
        self._is_staged = False
        self.finish()
        return self.previous

    def removed_at_start(self) -> int:
        """Returns the bytes of files of killed runs that the start of a run removes."""
        left = [p for f in (self._new, self._dropped) if f.is_dir() for p in f.rglob("*")]
        sizes = sum(path.stat().st_size for path in left if path.is_file())
        return sizes + (abandoned_bytes(self._folder) if self._folder.is_dir() else 0)

    def discard_unstarted(self) -> None:
        """Remove the files of a run that failed before `take_place`."""
        if self._is_staged:
            shutil.rmtree(self._new, ignore_errors=True)

    def finish(self) -> None:
        """Finish interrupted renames, then remove surplus runs."""
        if self._ready.is_dir() and self._incoming.is_dir():
            for path in self.present():
                path.rename(self._incoming / path.name)
        if self._incoming.is_dir():
            self._make_previous()
        if self._ready.is_dir():
            for path in sorted(self._ready.iterdir()):
                path.rename(self._folder / path.name)
            self._ready.rmdir()
        shutil.rmtree(self._new, ignore_errors=True)
        self._remove_surplus()

    def _make_previous(self) -> None:
        if not any(self._incoming.iterdir()):
            self._incoming.rmdir()
            return
        free = 1
        while self._numbered(free).exists():
            free += 1
        for number in range(free, 1, -1):
            self._numbered(number - 1).rename(self._numbered(number))
        self._incoming.rename(self.previous)

    def _numbered(self, number: int) -> Path:
        """Returns the folder of an earlier run; 1 is the latest."""
        return self.previous if number == 1 else Path(f"{self.previous}-{number}")

    def earlier(self) -> list[Path]:
        """Returns the folders of earlier runs, latest first."""
        pattern = re.compile(re.escape(self.previous.name) + r"(?:-([1-9]\d{0,8}))?")
        found = {}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if (match := pattern.fullmatch(path.name)) and path.is_dir():
                found[int(match[1] or 1)] = path
        return [found[number] for number in sorted(found)]

    def _remove_surplus(self) -> None:
        """Keep the latest earlier run and the latest finished ones, numbered from 1."""
        shutil.rmtree(self._dropped, ignore_errors=True)
        finished = kept = 0
        for number, path in enumerate(self.earlier(), start=1):
            counts = self._is_finished(path)
            if number > 1 and not (counts and finished < self._keep_runs):
                path.rename(self._dropped)  # as a whole, so that no part is mistaken for a run
                shutil.rmtree(self._dropped, ignore_errors=True)
                continue
            finished += counts
            kept += 1
            if path != self._numbered(kept):
                path.rename(self._numbered(kept))

    def _is_finished(self, folder: Path) -> bool:
        """Whether a run's log has its end; a run without a log counts as finished."""
        log = folder / f"{self._name}-log.jsonl"
        if not log.is_file():
            return True
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_END))
            lines = file.read().splitlines()
        try:
            last = json.loads(lines[-1])
            return bool(last["event"] == "end" and last.get("finished", True))
        except (LookupError, TypeError, ValueError, RecursionError):
            return False
