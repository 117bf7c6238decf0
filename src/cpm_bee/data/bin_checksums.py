"""`checksums.json`: the checksums of a binary dataset's data files (docs/format.md §9).

It lies beside `meta.bin`, and tools that do not know it ignore it. Data files of other tools have
none. An entry is that of a data file only if its counts are those in `meta.bin`: another tool that
writes the file anew does not know that it has checksums.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpm_bee import checksums
from cpm_bee.data.bin_meta import FileInfo, remedy
from cpm_bee.disk import open_to_write
from cpm_bee.errors import DamagedFile

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_COUNTS = ("nbytes", "nlines", "block_size")


def write_checksums(folder: Path, info: FileInfo) -> None:
    """Write the checksums of a dataset with one data file, which is read for them."""
    counts = {name: getattr(info, name) for name in _COUNTS}
    entry = {**counts, "blocks": checksums.of_blocks(folder / info.file_name)}
    with open_to_write(folder / CHECKSUMS, "x") as file:
        file.write(json.dumps(checksums.sealed({"files": {info.file_name: entry}})) + "\n")


def read_checksums(folder: Path, files: Sequence[FileInfo]) -> list[list[int] | None]:
    """The checksums of each data file's blocks; None for a file without.

    Raises:
        DamagedFile: `checksums.json` has changed since it was written.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return [None] * len(files)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not checksums.is_intact(values):
            raise ValueError
        entries: dict[str, Any] = values["files"]
        return [_blocks_of(entries.get(info.file_name), folder, info) for info in files]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DamagedFile(
            f"{path}: has changed since it was written (checksum)\n"
            f"remove it (rm {path}) to read the dataset without checksums, or {remedy(folder)}"
        ) from None


def _blocks_of(entry: Any, folder: Path, info: FileInfo) -> list[int] | None:
    if entry is None or info.mask:
        return None
    size = (info.block_end - info.block_begin) * info.block_size
    blocks = entry["blocks"]
    counts = [entry[name] for name in _COUNTS]
    if counts == [getattr(info, name) for name in _COUNTS] and (
        isinstance(blocks, list) and len(blocks) == -(-size // checksums.BLOCK)
    ):
        return blocks
    logger.warning(
        f"{folder / CHECKSUMS}: is about another {info.file_name}, which is read without checksums"
    )
    return None
