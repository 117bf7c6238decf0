"""Reads checkpoints in native or Hugging Face form (docs/format.md §6)."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpm_bee.checkpoint.fingerprint import SAMPLED, fingerprint
from cpm_bee.checkpoint.torch_file import check_before_loading, check_held
from cpm_bee.checkpoint.verification import verify_file
from cpm_bee.errors import DamagedFile, InputError, Problems, shown
from cpm_bee.files import atomic_file, is_usable_name, refuse_lfs_pointer
from cpm_bee.paths import not_a_file

PREFIX = "cpmbee."  # what Hugging Face's model has before the native names
_WRAPPED = "module."  # what DataParallel and DDP put before the names
_TIED = "lm_head.weight"
_INDEX = ".index.json"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# File names looked for in a folder, most complete first.
_IN_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# A shard of a checkpoint without an index.
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.bin|\.safetensors)")
# The first bytes of a `torch.save` file: a zip archive, or a pickle before torch 1.6.
_MAGIC = (b"PK\x03\x04", b"\x80")


class LazyTensor(NamedTuple):
    """A tensor in a file, read on demand; memory-mapped if the format allows it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Wraps a tensor that is already in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, partial(_same, tensor))

    def rows(self, begin: int, end: int) -> LazyTensor:
        """Returns the rows [begin, end), clipped as in a slice; used for a rank's shard.

        If the file is memory-mapped, only these rows are read.
        """
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        shape = (max(0, end - begin), *self.shape[1:])
        return LazyTensor(shape, self.dtype, lambda: self.read()[begin:end])


class Checkpoint:
    """The tensors of a checkpoint by native name, without reading their values.

    Args:
        path: a `.bin`/`.pt` or `.safetensors` file, an index of shards, or a folder of these.
        verify: read all files and compare them with their checksums.

    Attributes:
        is_hugging_face: whether the tensors have Hugging Face's names.

    Raises:
        DamagedFile: a checksum differs.
        InputError: there is no readable checkpoint, or tensors are not usable (all are listed).
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = checkpoint_file(path)
        self.entries: dict[str, LazyTensor] = {}
        problems = Problems()
        tied = None
        self.is_hugging_face = False
        for name, entry in _read_entries(self.path, verify).items():
            unwrapped = name.removeprefix(_WRAPPED)
            self.is_hugging_face |= unwrapped.startswith(PREFIX)
            native = unwrapped.removeprefix(PREFIX)
            if native == _TIED:
                tied = entry
            elif native in self.entries:
                problems.add(native, "appears twice, with and without the prefix 'cpmbee.'")
            elif entry.dtype not in _DTYPES:
                problems.add(native, f"has type {entry.dtype}, expected fp32, fp16 or bf16")
            else:
                self.entries[native] = entry
        embedding = self.entries.get("input_embedding.weight")
        if tied is not None and embedding is not None and tied.shape != embedding.shape:
            problems.add(
                _TIED,
                f"has shape {list(tied.shape)}, it is tied to "
                f"input_embedding.weight with {list(embedding.shape)}",
            )
        elif tied is not None and embedding is not None and not _are_equal(tied, embedding):
            problems.add(
                _TIED,
                "has other values than input_embedding.weight; CPM-Bee has one matrix for both, so "
                "this model would not be the same without it",
            )
        problems.raise_if_any(f"{self.path}: cannot be loaded:")
        if not self.entries:
            raise InputError(f"{self.path}: holds no tensors")

    def fingerprint(self) -> str:
        """Identifies the weights, whatever the file format; conversion from fp16 keeps it."""
        return fingerprint({name: entry.read for name, entry in self.entries.items()})


def _are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two matrices of one shape are equal as fp16, by rows that are evenly spread."""
    if len(a.shape) != 2:
        return True  # refused elsewhere
    if not a.dtype.is_floating_point:
        return False
    first, second = a.read(), b.read()
    count = min(a.shape[0], SAMPLED)
    rows = [i * (a.shape[0] - 1) // max(1, count - 1) for i in range(count)]
    return all(
        torch.equal(*(t[row].float().half().nan_to_num() for t in (first, second))) for row in rows
    )


def checkpoint_file(given: str | Path) -> Path:
    """The file, or the index or first shard, that `--load` means.

    Raises:
        InputError: there is none.
    """
    path = Path(given)
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return path / name
        if shards := sorted(p for p in path.iterdir() if _SHARD.fullmatch(p.name)):
            return shards[0]
        raise InputError(f"{path}: a folder without a checkpoint ({', '.join(_IN_FOLDER)})")
    if reason := not_a_file(path, "checkpoint"):
        raise InputError(
            f"{path}: {reason}. Put a CPM-Bee model there, or give another --load; "
            "--load ckpts/cpm-bee-tiny is the model that comes with this project"
        )
    return path


def files_of(path: Path) -> list[Path]:
    """All files of the checkpoint whose `checkpoint_file` is `path`."""
    if path.name.endswith(_INDEX):
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return [path, *(path.with_name(name) for name in sorted(names))]
    if match := _SHARD.fullmatch(path.name):
        return _shards(path, match)
    return [path]


def _shards(path: Path, match: re.Match[str]) -> list[Path]:
    stem, count, suffix = match["stem"], int(match["count"]), match["suffix"]
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{suffix}") for i in range(1, count + 1)]


def _read_entries(path: Path, verify: bool) -> dict[str, LazyTensor]:
    if path.name.endswith(_INDEX):
        return _read_shards(path, verify)
    if match := _SHARD.fullmatch(path.name):
        return _join_shards(path, match, verify)
    return _read_file(path, verify)


def _join_shards(path: Path, match: re.Match[str], verify: bool) -> dict[str, LazyTensor]:
    """The tensors of all shards of a checkpoint without an index, given one of them."""
    files = _shards(path, match)
    problems = Problems()
    for file in files:
        if not file.is_file():
            problems.add(file.name, "is missing")
    problems.raise_if_any(f"{path.parent}: the set of shards is incomplete:")
    entries: dict[str, LazyTensor] = {}
    for file in files:
        entries.update(_read_file(file, verify))
    return entries


def _read_file(path: Path, verify: bool) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        refuse_lfs_pointer(path)
        entries = _read_safetensors(path)
    else:
        entries = _read_bin(path)
    if verify:
        verify_file(path)
    return entries


def _read_shards(path: Path, verify: bool) -> dict[str, LazyTensor]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not an index of shards ({error!r})") from None
    problems = Problems()
    entries: dict[str, LazyTensor] = {}
    for name in files:
        # Shards are beside their index: an index that points elsewhere is not trusted.
        if not isinstance(name, str) or Path(name).name != name or not is_usable_name(name):
            problems.add(_named(name), "is not the name of a file beside the index")
        elif name.endswith(_INDEX):
            problems.add(name, "is an index, not a shard")
        elif not (path.parent / name).is_file():
            problems.add(name, "is missing")
        else:
            entries.update(_read_file(path.parent / name, verify))
    problems.extend("in the index only", [str(n) for n in weight_map if n not in entries])
    problems.raise_if_any(f"{path}: the set of shards is incomplete:")
    return entries


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    entries = {}
    problems = Problems()
    for name in file.keys():  # noqa: SIM118 - not a mapping
        slice_ = file.get_slice(name)
        if slice_.get_dtype() not in types:
            problems.add(name, f"has type {slice_.get_dtype()}, expected F32, F16 or BF16")
            continue
        dtype = types[slice_.get_dtype()]
        entries[name] = LazyTensor(tuple(slice_.get_shape()), dtype, partial(file.get_tensor, name))
    problems.raise_if_any(f"{path}: cannot be loaded:")
    return entries


def load_tensors(path: Path, kind: str, *, verify: bool = False) -> dict[str, Any]:
    """Load a flat dictionary with `torch.load`, memory-mapped if possible; runs no code.

    Args:
        kind: what the file should be, for messages.
        verify: compare the file with its checksums first, which reads all of it.

    Raises:
        DamagedFile: it is not such a file, or has changed since it was written.
        InputError: it contains something other than plain tensors.
    """
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        begin = file.read(16)
    if not begin.startswith(_MAGIC):
        raise DamagedFile(f"{path}: not {kind}, but a file that begins with {begin!r}")
    try:
        check_before_loading(path, verify=verify)
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files of torch before 1.6 are not zip archives and cannot be mapped.
            values = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(values, dict):
            # A tied tensor appears a second time.
            check_held((v for name, v in values.items() if not _is_tied(name)), path)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: contains something other than plain tensors, which {kind} does not "
            "need; it is not opened, since it could run code"
        ) from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(f"{path}: not {kind}, or a damaged one ({reason})") from None
    if not isinstance(values, dict):
        raise DamagedFile(f"{path}: not {kind} (a {type(values).__name__} instead of a dictionary)")
    return values


def _named(name: Any) -> str:
    return name if isinstance(name, str) and len(name) <= 255 else shown(name)


def _is_tied(name: Any) -> bool:
    return isinstance(name, str) and name.removeprefix(_WRAPPED).removeprefix(PREFIX) == _TIED


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _read_bin(path: Path) -> dict[str, LazyTensor]:
    problems = Problems()
    entries = {}
    for name, value in load_tensors(path, "a checkpoint").items():
        if not isinstance(name, str):
            problems.add(repr(name), "is not a name")
        elif not torch.is_tensor(value):
            problems.add(name, f"is a {type(value).__name__}, not a tensor")
        elif value.layout != torch.strided or value.is_meta:
            problems.add(name, "is sparse or has no values")
        else:
            entries[name] = LazyTensor.of(value)
    problems.raise_if_any(f"{path}: not a flat dictionary of tensors:")
    return entries


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Save a flat dictionary with `torch.save`, atomically."""
    with atomic_file(Path(path), "wb") as file:
        torch.save(dict(tensors), file)
