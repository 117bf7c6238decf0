"""Writes tensors to a file one at a time, so that only one need be in memory.

`torch.save` and safetensors' own writer need all tensors of a file at once. Both formats have
their directory at a place that can be computed from names, shapes and types:

- a safetensors file begins with a JSON header, followed by the values;
- a `torch.save` file is a zip archive, uncompressed. `data.pkl` is a pickle of the dictionary, in
  which each tensor refers to its values by a number; `data/NUMBER` has the values.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, NamedTuple

import torch
from torch._utils import _rebuild_tensor_v2

# The name of a type in a safetensors file.
TYPE_NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32",
}  # fmt: skip
# The class that a `torch.save` file names for the values of a type.
_STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
}
# Of the first tensor in a safetensors file, whose later tensors are aligned to their dtype, and of
# every tensor in a `torch.save` file.
_ALIGNMENT = 64
_ROOT = "archive"  # the folder in a `torch.save` file
_ZIP_HEADER = 30  # bytes, without name and extra fields
_ZIP64_FIELD = 20  # bytes that `zipfile` adds for sizes of 64 bits
_PADDING_ID = b"FB"  # of the extra field that aligns values, as torch names it


class StoredTensor(NamedTuple):
    """A tensor of a file, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    file: IO[bytes],
    stored: Sequence[StoredTensor],
    values: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file.

    Args:
        stored: the tensors, in the order of the file.
        values: the values of all of them, by name, in any order.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets = {}
    end = 0
    for tensor in stored:
        offsets[tensor.name] = end
        end += tensor.num_bytes
        header[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [end - tensor.num_bytes, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    begin = 8 + len(text)
    for name, value in values:
        file.seek(begin + offsets[name])
        file.write(_bytes_of(value))


def write_torch_file(
    file: IO[bytes],
    stored: Sequence[StoredTensor],
    values: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write a dictionary of tensors in the format of `torch.save`.

    Args:
        stored: the tensors, in the order of the dictionary.
        values: the values of all of them, in the same order.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, "data.pkl", _dictionary(stored))
        _add(archive, file, "byteorder", sys.byteorder.encode())
        for i, (tensor, (name, value)) in enumerate(zip(stored, values, strict=True)):
            assert (name, tuple(value.shape), value.dtype) == tensor
            _add(archive, file, f"data/{i}", _bytes_of(value))
        _add(archive, file, "version", b"3\n")


def _bytes_of(value: torch.Tensor) -> memoryview:
    # As bytes: NumPy has no bfloat16.
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, content: bytes | memoryview) -> None:
    """Add an entry to the archive, which is written to `file`; its content is aligned."""
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")  # of 1980: the same tensors give the same bytes
    begin = file.tell() + _ZIP_HEADER + len(entry.filename) + _ZIP64_FIELD + len(_PADDING_ID) + 2
    padding = -begin % _ALIGNMENT
    entry.extra = _PADDING_ID + struct.pack("<H", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as record:
        record.write(content)


class _Tensor:
    """Stands for a tensor in the pickle."""

    def __init__(self, number: int, stored: StoredTensor) -> None:
        self.number = number
        self.stored = stored


class _Values:
    """Stands for the values of a tensor in the pickle."""

    def __init__(self, number: int, stored: StoredTensor) -> None:
        size = torch.Size(stored.shape).numel()
        self.reference = ("storage", _STORAGES[stored.dtype], str(number), "cpu", size)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.reference if isinstance(value, _Values) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Tensor):
            return NotImplemented
        stored = value.stored
        strides = torch.empty(stored.shape, device="meta").stride()
        values = _Values(value.number, stored)
        hooks: OrderedDict[int, Any] = OrderedDict()
        return _rebuild_tensor_v2, (values, 0, stored.shape, strides, False, hooks)


def _dictionary(stored: Sequence[StoredTensor]) -> bytes:
    """The pickle of the dictionary of tensors."""
    buffer = io.BytesIO()
    tensors = {tensor.name: _Tensor(i, tensor) for i, tensor in enumerate(stored)}
    _Pickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()
