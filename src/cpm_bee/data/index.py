"""The token index: a dataset's tokens, made once and memory-mapped beside it.

The index can always be rebuilt from the records, so a missing, stale or damaged one is simply
made again. Its folder is named after the vocabulary; the dataset itself is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cpm_bee.data.batch import Pair
from cpm_bee.data.container import BinaryDataset, decode
from cpm_bee.encoding import EncodedRecord, Encoder, Shape, is_shuffled
from cpm_bee.errors import InputError, Problems
from cpm_bee.files import BusyError, atomic_folder
from cpm_bee.progress import progress
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

FORMAT = 1  # part of the folder's name: raise it when anything below changes

# The arrays of an index by file name, with their types and what counts their items.
_ARRAYS: dict[str, tuple[type, str]] = {
    "ids": (np.int32, "tokens"),
    "subs": (np.uint16, "tokens"),
    "segments": (np.uint16, "tokens"),
    "lengths": (np.int32, "records"),
    "num_targets": (np.int32, "records"),
    "shapes": (np.int32, "records"),
    "files": (np.int32, "records"),
    "offsets": (np.int64, "records"),
    "shuffled": (np.bool_, "records"),
    "extension_counts": (np.int32, "records"),
    "extension_ids": (np.int32, "extensions"),
    "extension_subs": (np.uint16, "extensions"),
}
_INFO = "index.json"
# How the system refuses to write; a read-only file system gives no PermissionError.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class TokenIndex:
    """The encoded records of a dataset; open one with `TokenIndex.of`.

    Attributes:
        lengths: tokens of each record, int32 [R].
        num_targets: targets of each record, int32 [R].
    """

    def __init__(self, folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        if info["dataset"] != dataset.fingerprint or info["vocabulary"] != tokenizer.fingerprint:
            raise ValueError("made of other data")
        arrays = {
            name: _map(folder / name, dtype, info[counted])
            for name, (dtype, counted) in _ARRAYS.items()
        }
        self.dataset = dataset
        self.lengths = np.asarray(arrays["lengths"])
        self.num_targets = np.asarray(arrays["num_targets"])
        self._arrays = arrays
        self._starts = _starts(self.lengths)
        self._extension_starts = _starts(arrays["extension_counts"])
        self._shapes = [Shape(tuple(d), tuple(map(bool, p))) for d, p in info["shapes"]]
        self._encoder = Encoder(tokenizer)
        self._keep: Any = None  # a temporary folder lives as long as its index

    @classmethod
    def of(cls, dataset: BinaryDataset, tokenizer: Tokenizer) -> TokenIndex:
        """Open the index of a dataset for a vocabulary, after making it where necessary.

        Raises:
            InputError: records that cannot be encoded; all are listed.
        """
        folder = dataset.folder / f"token_index-{FORMAT}-{tokenizer.fingerprint[:12]}"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return cls(folder, dataset, tokenizer)
        try:
            with atomic_folder(folder, replace=True) as new:
                build(new, dataset, tokenizer)
            return cls(folder, dataset, tokenizer)
        except (OSError, BusyError) as error:
            if isinstance(error, OSError) and error.errno not in _READ_ONLY:
                raise
            # Read-only data, or another run is making the same index: have one of our own.
            own = tempfile.TemporaryDirectory(prefix="cpm_bee-token_index-")
            build(Path(own.name), dataset, tokenizer)
            index = cls(Path(own.name), dataset, tokenizer)
            index._keep = own
            return index

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, number: int, rng: random.Random | None = None) -> EncodedRecord:
        """A record's tokens; with `rng`, the dictionaries of its answer are shuffled (SPEC §3)."""
        a = self._arrays
        if rng is not None and a["shuffled"][number]:
            return self._encoder.encode(self.source(number), rng=rng)
        tokens = slice(self._starts[number], self._starts[number + 1])
        return EncodedRecord(
            ids=a["ids"][tokens],
            subs=a["subs"][tokens],
            segments=a["segments"][tokens],
            shape=self._shapes[a["shapes"][number]],
        )

    def source(self, number: int) -> Record:
        """The record as it stands in the dataset."""
        return self.dataset.read(*self.place(number))

    def place(self, number: int) -> tuple[int, int]:
        """A record's data file and the byte it begins at."""
        return int(self._arrays["files"][number]), int(self._arrays["offsets"][number])

    def extension_pairs(self, numbers: Sequence[int]) -> list[Pair]:
        """The distinct (id, sub > 0) pairs of some records, sorted.

        A record that has a sub has all smaller ones of that id too (SPEC §3), so the index keeps
        only the largest of each id.
        """
        largest: dict[int, int] = {}
        for n in numbers:
            own = slice(self._extension_starts[n], self._extension_starts[n + 1])
            ids, subs = self._arrays["extension_ids"][own], self._arrays["extension_subs"][own]
            for token_id, sub in zip(ids.tolist(), subs.tolist(), strict=True):
                largest[token_id] = max(sub, largest.get(token_id, 0))
        return [(i, s) for i in sorted(largest) for s in range(1, largest[i] + 1)]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _map(path: Path, dtype: type, count: int) -> np.ndarray:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: wrong size")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)


class _Writer:
    """Appends to the arrays of an index, one file each, with bounded memory."""

    def __init__(self, folder: Path, files: Mapping[str, IO[bytes]]) -> None:
        self._folder = folder
        self._files = files
        self._counts = dict.fromkeys((counted for _, counted in _ARRAYS.values()), 0)
        self._shapes: dict[Shape, int] = {}

    def add(self, encoded: EncodedRecord, file: int, offset: int, shuffled: bool) -> None:
        places = np.flatnonzero(encoded.subs)
        largest: dict[int, int] = {}
        for place in places:
            token_id = int(encoded.ids[place])
            largest[token_id] = max(int(encoded.subs[place]), largest.get(token_id, 0))
        values: dict[str, Any] = {
            "ids": encoded.ids,
            "subs": encoded.subs,
            "segments": encoded.segments,
            "lengths": len(encoded),
            "num_targets": np.count_nonzero(~encoded.context),
            "shapes": self._shapes.setdefault(encoded.shape, len(self._shapes)),
            "files": file,
            "offsets": offset,
            "shuffled": shuffled,
            "extension_counts": len(largest),
            "extension_ids": list(largest),
            "extension_subs": list(largest.values()),
        }
        for name, value in values.items():
            self._files[name].write(np.asarray(value, dtype=_ARRAYS[name][0]).tobytes())
        self._counts["tokens"] += len(encoded)
        self._counts["records"] += 1
        self._counts["extensions"] += len(largest)

    def close(self, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        info = {
            "dataset": dataset.fingerprint,
            "vocabulary": tokenizer.fingerprint,
            "shapes": [[shape.depths, [int(p) for p in shape.predicted]] for shape in self._shapes],
            **self._counts,
        }
        (self._folder / _INFO).write_text(json.dumps(info), encoding="utf-8")


def build(folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
    """Write the index of a dataset into an existing folder.

    Raises:
        InputError: records that cannot be encoded; all are listed.
    """
    encoder = Encoder(tokenizer)
    problems = Problems()
    bar = progress(
        dataset, total=len(dataset), description=f"tokens of {dataset.folder.name}", unit="records"
    )
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(folder / n, "wb")) for n in _ARRAYS}
        writer = _Writer(folder, files)
        for file, offset, payload in bar:
            try:
                record = decode(payload)
                encoded = encoder.encode(record)
            except InputError as error:
                problems.add(dataset.where(file, offset), str(error))
                continue
            writer.add(encoded, file, offset, is_shuffled(record))
    problems.raise_if_any(f"{dataset.folder}: records that this model cannot read:")
    writer.close(dataset, tokenizer)
