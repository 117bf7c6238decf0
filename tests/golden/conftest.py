"""Batches of the golden records, made the way training makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from golden.recipe import read_lines

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.data.planning import Step, best_fit
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.tokenizer import Tokenizer


class Packed(NamedTuple):
    """A golden packing file, and the same made by this project."""

    arrays: dict[str, np.ndarray]
    records: list[EncodedRecord]
    steps: list[Step]
    batches: list[Batch]


Packing = tuple[list[EncodedRecord], list[Step], list[Batch]]
Pack = Callable[[Path, int, int], Packing]


@pytest.fixture(scope="session")
def pack(vocabulary: Tokenizer) -> Pack:
    def make(records: Path, batch_size: int, max_length: int) -> Packing:
        encoder = Encoder(vocabulary)
        encoded = [encoder.encode(record) for record in read_lines(records)]
        lengths = np.array([len(e) for e in encoded])
        usable = np.flatnonzero(lengths <= max_length)
        steps = [Step(r) for r in best_fit(usable, lengths[usable], batch_size, max_length)]
        batches = []
        for step in steps:
            # The table is in the order in which the records enter, the stream row by row.
            pairs = extension_pairs([encoded[n] for n in sorted(step.numbers)])
            batches.append(collate([encoded[n] for n in step.numbers], vocabulary, pairs))
        return encoded, steps, batches

    return make


@pytest.fixture(scope="session")
def packed(golden: Path, pack: Pack) -> dict[str, Packed]:
    result = {}
    for name in ("packing", "packing_tight"):
        arrays = dict(np.load(golden / f"{name}.npz"))
        sizes = int(arrays["batch_size"]), int(arrays["max_length"])
        result[name] = Packed(arrays, *pack(golden / f"{name}_records.jsonl", *sizes))
    return result
