"""Checks a `torch.save` file before torch reads it.

With `weights_only=True` torch runs no code from a file, but a file of a kilobyte can still exhaust
memory or never finish loading: by a compressed entry (a zip bomb), `bytearray(10**10)`, a
dictionary key of 2**60 nested tuples, or a tensor of 2**40 values that is a view of a single one.
`torch.save` writes none of these.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

# Enough to describe tens of thousands of tensors; reading a pickle takes time in proportion.
_MAX_PICKLE = 4 << 20
# References to memoised tuples: each can double the size of the value.
_MAX_TUPLES_AGAIN = 16
# Bytes by which tensors may exceed their file, because some are views of others.
_MAX_SHARED = 64 << 20
# A file of torch before 1.6 is a sequence of pickles (magic number, version, system, values, keys)
# followed by raw values.
_LEGACY_PICKLES = 5


def check_before_loading(path: Path) -> None:
    """Refuse a file that is not safe to pass to `torch.load`.

    Raises:
        pickle.UnpicklingError: the pickle has operations that tensors do not need.
        ValueError: the file is damaged, or was not written by torch.
    """
    if zipfile.is_zipfile(path):
        _check_zip(path)
    else:
        with open(path, "rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which torch.save never does")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        for entry in pickles:
            if max(entry.file_size, entry.compress_size) > _MAX_PICKLE:
                raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
            with archive.open(entry) as file:
                _check_pickle(file)


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
