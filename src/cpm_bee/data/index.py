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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpm_bee.data.batch import Pair
from cpm_bee.data.container import BinaryDataset
from cpm_bee.data.index_writer import ARRAYS, FORMAT, INFO, build
from cpm_bee.encoding import EncodedRecord, Encoder, Shape
from cpm_bee.files import BusyError, atomic_folder
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

# How the system refuses to write; a read-only file system gives no PermissionError.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class TokenIndex:
    """The encoded records of a dataset; open one with `TokenIndex.of`.

    Attributes:
        lengths: tokens of each record, int32 [R].
        num_targets: targets of each record, int32 [R].
    """

    def __init__(self, folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if info["dataset"] != dataset.fingerprint or info["vocabulary"] != tokenizer.fingerprint:
            raise ValueError("made of other data")
        arrays = {
            name: _map(folder / name, dtype, info[counted])
            for name, (dtype, counted) in ARRAYS.items()
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
