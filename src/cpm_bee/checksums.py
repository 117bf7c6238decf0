"""CRC-32 checksums of the blocks of a file, each compared when the block is first used.

A file of gigabytes is neither read as a whole before its first use nor used unchecked. A list of
such checksums is kept in a JSON file, which has a checksum of itself (`sealed`).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_bee.errors import DamagedFile

BLOCK = 1 << 16  # bytes
SEAL = "crc32"  # the field of a sealed object


def of_blocks(path: Path) -> list[int]:
    """The CRC-32 of each block of a file; the last block may be shorter."""
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb") as file:
        return [zlib.crc32(block[:size]) for size in iter(lambda: file.readinto(block), 0)]


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a field that has their checksum."""
    return {**values, SEAL: _checksum(values)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether the values of a sealed object are those that were sealed."""
    return values.get(SEAL) == _checksum({k: v for k, v in values.items() if k != SEAL})


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


class CheckedBlocks:
    """The blocks of a file, which may be memory-mapped and replaced meanwhile; thread-safe.

    Args:
        size: of the file, in bytes.
        checksums: see `of_blocks`.
        remedy: what to do about damage, for the message.

    Attributes:
        unused: for each block a byte, which is 1 before its first use and 0 then.
        num_unused: the number of such blocks.
    """

    def __init__(self, path: Path, size: int, checksums: Sequence[int], remedy: str) -> None:
        if len(checksums) != -(-size // BLOCK):
            raise ValueError(f"{path}: not a checksum for each block")
        self._path = path
        self._size = size
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._checksums = checksums
        self._remedy = remedy
        self.unused = bytearray(b"\1") * len(checksums)
        self.num_unused = len(checksums)
        self._lock = threading.Lock()  # else two threads would count a block twice

    def check(self, begin: int, end: int) -> None:
        """Compare the blocks of the bytes [begin, end) that have not been compared before.

        Raises:
            DamagedFile: a checksum differs.
        """
        if not self.num_unused:
            return
        last = -(-end // BLOCK)
        with self._lock:
            block = self.unused.find(1, begin // BLOCK, last)
            while block >= 0:
                self._compare(block)
                block = self.unused.find(1, block, last)

    def _compare(self, block: int) -> None:
        begin, end = block * BLOCK, min((block + 1) * BLOCK, self._size)
        # Hazard: not from the map, since on a full tmpfs a hole in a file cannot be read from one.
        if zlib.crc32(os.pread(self._descriptor, end - begin, begin)) != self._checksums[block]:
            raise DamagedFile(
                f"{self._path}: bytes {begin} to {end - 1} have changed since they were written "
                f"(checksum)\n{self._remedy}"
            )
        self.unused[block] = 0
        self.num_unused -= 1
