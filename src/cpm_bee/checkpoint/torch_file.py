"""Checks a `torch.save` file before torch reads it, and compares it with its checksums.

With `weights_only=True` torch runs no code from a file, but a file of a kilobyte can still exhaust
memory or never finish loading: by a compressed entry (a zip bomb), `bytearray(10**10)`, a
dictionary key of 2**60 nested tuples, or a tensor of 2**40 values that is a view of a single one.
`torch.save` writes none of these.

The file is a zip archive with a CRC-32 for each entry, but `torch.load` does not compare them.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from cpm_bee.progress import progress_bar

# Enough to describe tens of thousands of tensors; reading a pickle takes time in proportion.
_MAX_PICKLE = 4 << 20
# References to memoised tuples: each can double the size of the value.
_MAX_TUPLES_AGAIN = 16
# Bytes by which tensors may exceed their file, because some are views of others.
_MAX_SHARED = 64 << 20
# A file of torch before 1.6 is a sequence of pickles (magic number, version, system, values, keys)
# followed by raw values.
_LEGACY_PICKLES = 5
_VERIFIED_AT_ONCE = 1 << 20  # bytes


def check_before_loading(path: Path, *, verify: bool = False) -> bool:
    """Refuse a file that is not safe to pass to `torch.load`.

    Args:
        verify: also compare the file with its checksums, which reads all of it.

    Returns:
        Whether it has checksums: one that was written before torch 1.6, or with
        `torch.serialization.set_crc32_options(False)`, has none.

    Raises:
        pickle.UnpicklingError: the pickle has operations that tensors do not need.
        ValueError: the file is damaged, or was not written by torch.
    """
    if zipfile.is_zipfile(path):
        return _check_zip(path, verify)
    with open(path, "rb") as file:
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)
    return False


def _check_zip(path: Path, verify: bool) -> bool:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which torch.save never does")
        has_checksums = any(entry.CRC for entry in entries)
        if verify and has_checksums:
            _compare(path, archive)
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        for entry in pickles:
            if not has_checksums:
                entry.CRC = None  # type: ignore[assignment]  # compares nothing
            if max(entry.file_size, entry.compress_size) > _MAX_PICKLE:
                raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
            with archive.open(entry) as file:
                _check_pickle(file)
    return has_checksums


def stored_crc32s(path: Path) -> list[tuple[str, int, int]] | None:
    """The parts of a `torch.save` file with their sizes and the CRC-32 that it holds of each.

    None for a file without. The first folder of a name is left out: it is that of the file.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not any(entry.CRC for entry in entries):
        return None
    return sorted((e.filename.partition("/")[2], e.file_size, e.CRC) for e in entries)


def _compare(path: Path, archive: zipfile.ZipFile) -> None:
    """Compare the entries of an archive, none of them compressed, with their checksums."""
    size = path.stat().st_size
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise ValueError("its entries overlap")  # could be read without end
    with progress_bar(total=size, description=f"verifying {path.name}", unit="B", delay=2) as bar:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as file:  # compares the checksum at its end
                    while data := file.read(_VERIFIED_AT_ONCE):
                        bar.update(len(data))
            except (zipfile.BadZipFile, EOFError):
                raise ValueError(
                    f"{_part(path, entry.filename)} has changed since it was written: its checksum "
                    "differs"
                ) from None


def _check_pickle(file: IO[bytes]) -> None:
    begin = file.tell()
    before = ""
    memo_tuples: set[Any] = set()
    uses = 0
    for info, argument, position in pickletools.genops(file):
        name = info.name
        if position is not None and position - begin > _MAX_PICKLE:
            raise ValueError(f"its pickle has more than {_MAX_PICKLE} bytes")
        if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            module = str(argument).split(" ")[0]
            if module != "collections" and module.split(".")[0] != "torch":
                raise pickle.UnpicklingError(f"names {argument}")
        elif name in ("PUT", "BINPUT", "LONG_BINPUT") and before.startswith("TUPLE"):
            memo_tuples.add(argument)
        elif name in ("GET", "BINGET", "LONG_BINGET") and argument in memo_tuples:
            uses += 1
            if uses > _MAX_TUPLES_AGAIN:
                raise pickle.UnpicklingError("uses its tuples again and again")
        before = name


def check_held(values: Iterable[Any], path: Path) -> None:
    """Refuse tensors with far more values than their file contains, such as expanded views.

    Raises:
        ValueError: the tensors are too large for the file.
    """
    size = sum(
        value.numel() * value.element_size()
        for value in values
        if torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
    )
    if size > path.stat().st_size + _MAX_SHARED:
        raise ValueError(f"its tensors have {size} bytes, the file holds fewer")


def _part(path: Path, entry: str) -> str:
    """The name of the tensor in an entry of a file, or that of the entry."""
    _, _, number = entry.rpartition("/data/")
    if number.isdecimal():
        try:
            check_before_loading(path)
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            # torch.save numbers the storages in the order in which it meets them.
            names: dict[int, str] = {}
            for name, tensor in _tensors(values):
                names.setdefault(tensor.untyped_storage()._cdata, name)
            return list(names.values())[int(number)]
        except Exception:  # a damaged file can raise nearly anything
            pass
    return entry


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}/{key}" if name else str(key))
