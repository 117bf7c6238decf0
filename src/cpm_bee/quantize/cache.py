"""Quantizes a base once, tensor by tensor, into a safetensors file beside its checkpoint.

The file has `NAME.codes` and `NAME.absmax` for each Linear of the layers; embedding, norms and
bias table are copied from the checkpoint. The metadata have the fingerprint of the base. The last
tensor has the checksums of all others, which are compared when the file is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cpm_bee.checkpoint.loading import drop_pages, read_ahead
from cpm_bee.checkpoint.reader import Checkpoint, LazyTensor
from cpm_bee.checkpoint.writer import TYPE_NAMES, StoredTensor, write_safetensors
from cpm_bee.disk import shortage
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.quantize.formats import FORMATS, Format
from cpm_bee.quantize.linear import insert_quantized_linears
from cpm_bee.temporary_files import abandoned_bytes

logger = logging.getLogger(__name__)

VERSION = "2"
_WITHOUT_CHECKSUMS = "1"  # files of this version are still read
# The CRC-32 of each tensor, in the order of the file; uint8 [tensors, 4], little-endian.
_CHECKSUMS = "cpm_bee.crc32"
_WEIGHT, _CODES, _ABSMAX = ".weight", ".codes", ".absmax"


def cache_path(checkpoint: Path, fmt: Format) -> Path:
    """`pytorch_model.nf4.safetensors` for `pytorch_model.bin`, or for an index of its shards."""
    name = checkpoint.name.removesuffix(".index.json")
    return checkpoint.with_name(f"{Path(name).stem}.{fmt.name}.safetensors")


def quantized_entries(model: CPMBee, checkpoint: Checkpoint, kind: str) -> dict[str, LazyTensor]:
    """Replace the Linears of a model by quantized ones and return the model's tensors.

    The tensors come from the file beside the checkpoint, which is made if it is missing, stale or
    damaged. If it cannot be written, a warning is logged and they are made in memory.

    Args:
        model: a model on the meta device that matches the checkpoint.
        kind: the name of a format.

    Raises:
        InputError: the format does not support the model, or values are not finite.
    """
    fmt = FORMATS[kind]
    insert_quantized_linears(model, fmt)
    stored = _stored_tensors(model, checkpoint)
    return _from_cache(checkpoint, fmt, stored) or _in_memory(checkpoint, fmt, stored)


def _stored_tensors(model: CPMBee, checkpoint: Checkpoint) -> list[StoredTensor]:
    stored = []
    for name, parameter in model.named_parameters():
        entry = checkpoint.entries.get(name)  # None for codes and absmax
        dtype = parameter.dtype if entry is None else entry.dtype
        stored.append(StoredTensor(name, tuple(parameter.shape), dtype))
    # Tensors whose size is a multiple of 4 bytes come first, so that all of them are aligned.
    return sorted(stored, key=lambda s: s.num_bytes % 4 != 0)


class _Cached(NamedTuple):
    """An open file; one of an earlier version has no checksums."""

    entries: dict[str, LazyTensor]
    checksums: LazyTensor | None


def _from_cache(
    checkpoint: Checkpoint, fmt: Format, stored: list[StoredTensor]
) -> dict[str, LazyTensor] | None:
    """The tensors of the file, which is made first if necessary; None if it cannot be written."""
    path = cache_path(checkpoint.path, fmt)
    notes = {"format": fmt.name, "base_fingerprint": checkpoint.fingerprint()}
    with _alone(checkpoint.path):
        found = _open(path, checkpoint.path, notes, stored)
        if found is None:
            return _make(path, checkpoint, fmt, stored, notes)
    if _first_damaged(path, found) is None:  # without the lock: several processes at once
        return found.entries
    with _alone(checkpoint.path):
        found = _open(path, checkpoint.path, notes, stored)
        if found is not None:
            damaged = _first_damaged(path, found)
            if damaged is None:  # another process has made it again
                return found.entries
            logger.warning(f"{path}: {damaged} has changed since it was written (checksum)")
        return _make(path, checkpoint, fmt, stored, notes)


def _make(
    path: Path,
    checkpoint: Checkpoint,
    fmt: Format,
    stored: list[StoredTensor],
    notes: dict[str, str],
) -> dict[str, LazyTensor] | None:
    logger.info(f"quantizing {checkpoint.path} to {fmt.name}, once")
    try:
        _require_room(path, stored)
        with atomic_file(path, "wb") as file:
            values = _with_checksums(_values(checkpoint, fmt, stored), stored)
            content = [*stored, _checksums_of(stored)]
            write_safetensors(file, content, values, {**notes, "format_version": VERSION})
        # Never older than the checkpoint, even if the checkpoint's time is in the future.
        newest = max(path.stat().st_mtime_ns, checkpoint.path.stat().st_mtime_ns)
        os.utime(path, ns=(newest, newest))
    except OSError as error:
        logger.warning(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}): "
            "quantizing in memory, in this run and every run until it can be written"
        )
        return None
    made = _open(path, checkpoint.path, notes, stored)
    return None if made is None else made.entries


def _require_room(path: Path, stored: list[StoredTensor]) -> None:
    """Raise `OSError` if the disk has no room for the file, instead of quantizing in vain."""
    needed = sum(tensor.num_bytes for tensor in stored) - abandoned_bytes(path.parent)
    if reason := shortage(path.parent, needed, "the quantized base"):
        raise OSError(errno.ENOSPC, reason, str(path))


@contextlib.contextmanager
def _alone(checkpoint: Path) -> Iterator[None]:
    """Hold a lock, so that only one of several processes quantizes and the others use its file.

    If the file system has no locks, each process makes the file, and the last one replaces the
    others.
    """
    with open(checkpoint, "rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(
    path: Path, checkpoint: Path, notes: dict[str, str], stored: list[StoredTensor]
) -> _Cached | None:
    """The open file; None if it is missing, damaged, or of another base or version."""
    try:
        if path.stat().st_mtime_ns < checkpoint.stat().st_mtime_ns:
            return None  # a fingerprint covers only both ends of each tensor
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None
    version = metadata.get("format_version")
    if version not in (VERSION, _WITHOUT_CHECKSUMS):
        return None
    if any(metadata.get(key) != value for key, value in notes.items()):
        return None
    content = stored if version == _WITHOUT_CHECKSUMS else [*stored, _checksums_of(stored)]
    expected = {s.name: (list(s.shape), TYPE_NAMES[s.dtype]) for s in content}
    if {n: (list(s.get_shape()), s.get_dtype()) for n, s in slices.items()} != expected:
        return None
    entries = {
        s.name: LazyTensor(s.shape, s.dtype, partial(file.get_tensor, s.name)) for s in content
    }
    return _Cached(entries, entries.pop(_CHECKSUMS, None))


def _checksums_of(stored: list[StoredTensor]) -> StoredTensor:
    return StoredTensor(_CHECKSUMS, (len(stored), 4), torch.uint8)


def _with_checksums(
    values: Iterator[tuple[str, torch.Tensor]], stored: list[StoredTensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the values, and then their checksums."""
    checksums = {}
    for name, value in values:
        checksums[name] = zlib.crc32(_bytes_of(value))
        yield name, value
    numbers = np.array([checksums[s.name] for s in stored], dtype="<u4")
    yield _CHECKSUMS, torch.from_numpy(numbers.view(np.uint8).reshape(-1, 4))


def _first_damaged(path: Path, cached: _Cached) -> str | None:
    """The name of the first tensor whose checksum differs; reads all of the file."""
    if cached.checksums is None:
        return None
    numbers = cached.checksums.read().numpy().view("<u4").ravel().tolist()
    total = path.stat().st_size
    with progress_bar(total=total, description=f"verifying {path.name}", unit="B", delay=2) as bar:
        for (name, entry), expected in zip(cached.entries.items(), numbers, strict=True):
            value = entry.read()
            read_ahead(value)
            if zlib.crc32(_bytes_of(value)) != expected:
                return name
            bar.update(value.nbytes)
            drop_pages(value)
    return None


def _bytes_of(value: torch.Tensor) -> memoryview:
    # As bytes: NumPy has no bfloat16.
    return value.contiguous().view(-1).view(torch.uint8).numpy().data


def _values(
    checkpoint: Checkpoint, fmt: Format, stored: list[StoredTensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors of the file; reads one tensor of the checkpoint at a time."""
    total = sum(torch.Size(e.shape).numel() * e.dtype.itemsize for e in checkpoint.entries.values())
    names = {s.name for s in stored}
    with progress_bar(total=total, description="quantizing", unit="B") as bar:
        for name, entry in checkpoint.entries.items():
            value = entry.read()
            if name in names:
                yield name, value
            else:
                layer = name.removesuffix(_WEIGHT)
                try:
                    codes, absmax = fmt.quantize(value)
                except InputError as error:
                    raise InputError(f"{checkpoint.path}: {name} {error}") from None
                yield layer + _CODES, codes
                yield layer + _ABSMAX, absmax
            bar.update(value.numel() * value.element_size())
            drop_pages(value)


def _in_memory(
    checkpoint: Checkpoint, fmt: Format, stored: list[StoredTensor]
) -> dict[str, LazyTensor]:
    values = dict(_values(checkpoint, fmt, stored))
    return {
        s.name: LazyTensor(s.shape, s.dtype, partial(values.__getitem__, s.name)) for s in stored
    }
