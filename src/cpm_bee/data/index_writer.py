"""Writing a token index: see `data.index`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cpm_bee.data.container import BinaryDataset, decode
from cpm_bee.encoding import EncodedRecord, Encoder, Shape, is_shuffled
from cpm_bee.errors import InputError, Problems
from cpm_bee.progress import progress
from cpm_bee.tokenizer import Tokenizer

FORMAT = 1  # part of the folder's name: raise it when anything below changes

# The arrays of an index by file name, with their types and what counts their items.
ARRAYS: dict[str, tuple[type, str]] = {
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
INFO = "index.json"


class _Writer:
    """Appends to the arrays of an index, one file each, with bounded memory."""

    def __init__(self, folder: Path, files: Mapping[str, IO[bytes]]) -> None:
        self._folder = folder
        self._files = files
        self._counts = dict.fromkeys((counted for _, counted in ARRAYS.values()), 0)
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
            self._files[name].write(np.asarray(value, dtype=ARRAYS[name][0]).tobytes())
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
        (self._folder / INFO).write_text(json.dumps(info), encoding="utf-8")


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
        files = {n: stack.enter_context(open(folder / n, "wb")) for n in ARRAYS}
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
