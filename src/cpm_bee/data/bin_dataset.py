"""The binary dataset: a folder of data files and `meta.bin` (docs/format.md §9).

A data file consists of blocks of equal size. A block contains consecutive records and is padded
with zeros; no record crosses the end of a block. A record is the byte 0x1f, the length of its
payload (uint32, little-endian) and the payload, a pickle (`record_pickle`); a zero byte instead of
0x1f ends the block. `meta.bin` lists the data files with their numbers of blocks and records.

Data files are memory-mapped for reading. Those with checksums (`bin_checksums`) are compared with
them, each part before it is first read. Preprocessing does not write a dataset record by record:
it knows the sizes of all records in order, `BlockLayout` computes where each begins, and several
processes write their records at those offsets (`preprocess.gather`).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpm_bee.checksums import CheckedBlocks
from cpm_bee.data.bin_checksums import CHECKSUMS, read_checksums
from cpm_bee.data.bin_meta import META, FileInfo, read_meta, remedy, size_problems
from cpm_bee.data.record_pickle import decode
from cpm_bee.errors import InputError, Problems
from cpm_bee.records import Record

BLOCK_SIZE = 16 << 20
RECORD, END = b"\x1f", b"\x00"
LENGTH = struct.Struct("<I")
HEAD = len(RECORD) + LENGTH.size
FINGERPRINT_BYTES = 64 << 10


def payload_limit(block_size: int) -> int:
    """The largest size of a payload in bytes: every block ends with at least one `END`."""
    return min(block_size - HEAD - len(END), 2 ** (8 * LENGTH.size) - 1)


class BlockLayout:
    """Computes the offsets of a data file's records; none crosses the end of a block (§9)."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._begin = 0  # of the current block
        self._offset = 0  # within the current block
        self._nbytes = 0
        self._nlines = 0
        self._full: list[int] = []  # where the records of each block before the current one end

    @property
    def size(self) -> int:
        """The size of the file so far in bytes: whole blocks, at least one."""
        return self._begin + self._block_size

    def append(self, frame_sizes: Iterable[int]) -> array[int]:
        """Append records; returns the offset of each.

        Args:
            frame_sizes: bytes of each record, including `HEAD`.
        """
        offsets = array("q")
        begin, offset, block_size = self._begin, self._offset, self._block_size
        total = 0
        for size in frame_sizes:
            if offset + size + len(END) > block_size:
                self._full.append(begin + offset)
                begin += block_size
                offset = 0
            offsets.append(begin + offset)
            offset += size
            total += size
        self._begin, self._offset = begin, offset
        self._nlines += len(offsets)
        self._nbytes += total - len(offsets) * (HEAD - LENGTH.size)
        return offsets

    @property
    def ends(self) -> list[int]:
        """Where the records of each block end, at which there is an `END`."""
        return [*self._full, self._begin + self._offset]

    def info(self, file_name: str) -> FileInfo:
        blocks = self.size // self._block_size
        return FileInfo(file_name, 0, blocks, self._nbytes, self._nlines, False, self._block_size)


def frame(payload: bytes) -> bytes:
    """A payload as it is stored in a data file."""
    return RECORD + LENGTH.pack(len(payload)) + payload


class BinaryDataset:
    """Reads a dataset; data files are memory-mapped and no code in them is run.

    Iteration yields `(file_index, offset, payload)` for each record of the files that are not
    masked, in order; `offset` is in bytes from the beginning of the data file.

    Raises:
        InputError: the folder is not a dataset, `meta.bin` is invalid, or a data file is missing or
            has the wrong size; while iterating, a data file is damaged (with file and offset).
        DamagedFile: while reading, a checksum differs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = read_meta(self.folder)
        self._maps: dict[int, mmap.mmap] = {}
        self._blocks: dict[int, CheckedBlocks] = {}
        problems = Problems()
        for info in self.files:
            problems.extend(str(self.folder / info.file_name), size_problems(self.folder, info))
        problems.raise_if_any(f"{self.folder}: the dataset is damaged", remedy(self.folder))
        self._checksums = read_checksums(self.folder, self.files)

    def __len__(self) -> int:
        return sum(info.nlines for info in self.files if not info.mask)

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        for index, info in enumerate(self.files):
            if not info.mask:
                yield from self._iterate_file(index, info)

    def _iterate_file(self, index: int, info: FileInfo) -> Iterator[tuple[int, int, bytes]]:
        count = 0
        for block in range(info.block_end - info.block_begin):
            offset, end = block * info.block_size, (block + 1) * info.block_size
            while offset < end:
                self._check(index, offset, offset + 1)
                if self._map(index)[offset : offset + 1] == END:
                    break
                payload = self._payload(index, offset)
                yield index, offset, payload
                offset += HEAD + len(payload)
                count += 1
        if count != info.nlines:
            raise InputError(
                f"{self.folder / info.file_name}: holds {count} records, {META} says "
                f"{info.nlines}\n{remedy(self.folder)}"
            )

    def read(self, file_index: int, offset: int) -> Record:
        """The record at an offset that iteration yielded.

        Raises:
            InputError: there is no record, or it is not valid; the message has file and offset.
        """
        payload = self._payload(file_index, offset)
        try:
            return decode(payload)
        except InputError as error:
            raise self._damage(file_index, offset, str(error)) from None

    def where(self, file_index: int, offset: int) -> str:
        """The location of a record, for messages."""
        return f"{self.folder / self.files[file_index].file_name}, byte {offset}"

    @property
    def fingerprint(self) -> str:
        """A digest of `meta.bin` and of each file's size, first and last bytes."""
        digest = hashlib.sha256((self.folder / META).read_bytes())
        for index, info in enumerate(self.files):
            if info.mask:
                continue
            with open(self.folder / info.file_name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for begin in (0, max(0, size - FINGERPRINT_BYTES)):
                    self._check(index, begin, min(size, begin + FINGERPRINT_BYTES))
                digest.update(size.to_bytes(8, "little"))
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(file.read(FINGERPRINT_BYTES))
        return digest.hexdigest()

    @property
    def checksums(self) -> list[list[int]] | None:
        """The CRC-32 checksums of each data file's blocks, as `checksums.json` has them.

        None if there is a data file without. Nothing is compared with them here.
        """
        found = [c for c, info in zip(self._checksums, self.files, strict=True) if not info.mask]
        known = [checksums for checksums in found if checksums is not None]
        return known if len(known) == len(found) else None

    @property
    def paths(self) -> list[Path]:
        """`meta.bin` and the data files."""
        names = [info.file_name for info in self.files if not info.mask]
        return [self.folder / META, *(self.folder / name for name in names)]

    def compare_all(self) -> None:
        """Compare all data with its checksums; shows a progress bar after two seconds.

        Raises:
            DamagedFile: a checksum differs.
        """
        from cpm_bee.progress import progress_bar  # make_docs.py imports this without tqdm

        sizes = {
            index: os.path.getsize(self.folder / info.file_name)
            for index, info in enumerate(self.files)
            if not info.mask and self._checksums[index] is not None
        }
        total = sum(sizes.values())
        with progress_bar(total=total, description="comparing", unit="B", delay=2) as bar:
            for index, size in sizes.items():
                for begin in range(0, size, BLOCK_SIZE):
                    end = min(size, begin + BLOCK_SIZE)
                    self._check(index, begin, end)
                    bar.update(end - begin)

    def _map(self, index: int) -> mmap.mmap:
        # Opened at first use, so that masked files and forked readers have no needless maps.
        if index not in self._maps:
            with open(self.folder / self.files[index].file_name, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if (checksums := self._checksums[index]) is not None:
                path = self.folder / self.files[index].file_name
                advice = (
                    f"{remedy(self.folder)}\n(if another tool has changed it on purpose, remove "
                    f"{self.folder / CHECKSUMS})"
                )
                self._blocks[index] = CheckedBlocks(path, len(data), checksums, advice)
            self._maps[index] = data  # last: another thread may read records meanwhile
        return self._maps[index]

    def _check(self, index: int, begin: int, end: int) -> None:
        """Compare the bytes [begin, end) of a data file with its checksums, if it has any."""
        if begin < end:
            self._map(index)
            if (blocks := self._blocks.get(index)) is not None:
                blocks.check(begin, end)

    def _payload(self, index: int, offset: int) -> bytes:
        if self.files[index].block_end == self.files[index].block_begin:
            raise self._damage(index, offset, "no record begins there")  # an empty file has no map
        data, block_size = self._map(index), self.files[index].block_size
        room = block_size - offset % block_size
        if not 0 <= offset < len(data):
            raise self._damage(index, offset, "no record begins there")
        self._check(index, offset, min(offset + HEAD, len(data)))
        if data[offset : offset + 1] != RECORD:
            raise self._damage(index, offset, "no record begins there")
        if room < HEAD:
            raise self._damage(index, offset, "the record crosses the end of its block")
        (length,) = LENGTH.unpack_from(data, offset + len(RECORD))
        if length > room - HEAD:
            raise self._damage(
                index, offset, f"the record ({length} bytes) crosses the end of its block"
            )
        self._check(index, offset + HEAD, offset + HEAD + length)
        return data[offset + HEAD : offset + HEAD + length]

    def _damage(self, index: int, offset: int, reason: str) -> InputError:
        return InputError(f"{self.where(index, offset)}: {reason}\n{remedy(self.folder)}")
