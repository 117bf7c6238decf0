"""Hashes that identify the files of a run, without reading large ones twice.

A hash is a dictionary of `kind` and `value`. The kinds say what has been read for it:

    sha256          all bytes of the file
    stored-sha256   nothing: its release says so (`checkpoint.verification`)
    stored-crc32    nothing: SHA-256 of the CRC-32 checksums that come with it, those in a
                    `torch.save` file or those in `checksums.json`

Small files are read at once. Large ones without stored checksums are read in the background, while
the run goes on; until that is done they have only their fingerprint, which covers the ends.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpm_bee.checkpoint.torch_file import stored_crc32s
from cpm_bee.checkpoint.verification import sha256_of, sha256_of_release
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.progress import progress_bar

SHA256, STORED_SHA256, STORED_CRC32 = "sha256", "stored-sha256", "stored-crc32"
SMALL = 64 << 20  # bytes that are read in a moment

Hash = dict[str, str]


def quick_hash(path: Path, *, small: int | None = None) -> Hash | None:
    """The hash of a file: of its bytes if it is small, else one that is stored; None if none is.

    Args:
        small: the largest size in bytes of a file to read; `SMALL` if None.
    """
    if path.stat().st_size <= (SMALL if small is None else small):
        return {"kind": SHA256, "value": sha256_of(path, "")}
    if path.suffix != ".safetensors":
        with suppress(OSError, zipfile.BadZipFile, ValueError):
            if (parts := stored_crc32s(path)) is not None:
                return {"kind": STORED_CRC32, "value": digest_of(parts)}
    if (release := sha256_of_release(path)) is not None:
        return {"kind": STORED_SHA256, "value": release}
    return None


def quick_hash_of_dataset(dataset: BinaryDataset) -> Hash | None:
    """The hash of a dataset, as `quick_hash`; None if it is large and has no checksums."""
    if sum(path.stat().st_size for path in dataset.paths) <= SMALL:
        return whole_hash(dataset.paths, {path: sha256_of(path, "") for path in dataset.paths})
    if (checksums := dataset.checksums) is not None:
        return {"kind": STORED_CRC32, "value": digest_of(checksums)}
    return None


def whole_hash(paths: Sequence[Path], known: dict[Path, str]) -> Hash | None:
    """The hash of several files together, from the SHA-256 of each; None if one is not known."""
    if any(path not in known for path in paths):
        return None
    return {"kind": SHA256, "value": digest_of([[path.name, known[path]] for path in paths])}


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class BackgroundHashes:
    """The SHA-256 of files, computed by a thread while a run goes on.

    Attributes:
        found: those that are known by now.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.found: dict[Path, str] = {}
        self._paths = list(paths)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hashes", daemon=True)
        if self._paths:
            self._thread.start()

    def _run(self) -> None:
        for path in self._paths:
            with suppress(OSError):
                value = sha256_of(path, "", is_stopped=self._stop.is_set)
                if self._stop.is_set():
                    return
                self.found[path] = value

    def stop(self) -> None:
        """Leave out what is not known yet."""
        self._stop.set()

    def wait(self) -> None:
        """Wait until all are known; shows a progress bar after two seconds."""
        with progress_bar(
            total=len(self._paths), description="hashing", unit="file", delay=2
        ) as bar:
            while self._thread.is_alive():
                time.sleep(0.05)
                bar.update(len(self.found) - bar.n)
