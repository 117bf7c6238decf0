"""Batches of the golden records, made the way training makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from golden.recipe import read_lines

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.tokenizer import Tokenizer


class GoldenStep(NamedTuple):
    """The records of a step, row by row."""

    rows: list[list[int]]

    @property
    def numbers(self) -> list[int]:
        return [number for row in self.rows for number in row]


def best_fit(lengths: list[int], batch_size: int, max_length: int) -> list[GoldenStep]:
    """The packing that made the golden files, the usual rule of docs/format.md §4 word for word."""
    open_rows: list[list[int]] = []  # oldest first
    steps = []
    for number, length in enumerate(lengths):
        if length > max_length:
            continue
        best = None
        for row in open_rows:
            space = max_length - sum(lengths[n] for n in row)
            if space >= length and (best is None or space < best[0]):
                best = (space, row)
        if best is None:
            open_rows.append([number])
        else:
            best[1].append(number)
        if len(open_rows) == batch_size + 1:
            steps.append(GoldenStep(open_rows[:batch_size]))
            open_rows = open_rows[batch_size:]
    return steps + ([GoldenStep(open_rows)] if open_rows else [])


class Packed(NamedTuple):
    """A golden packing file, and the same made by this project."""

    arrays: dict[str, np.ndarray]
    records: list[EncodedRecord]
    steps: list[GoldenStep]
    batches: list[Batch]


Packing = tuple[list[EncodedRecord], list[GoldenStep], list[Batch]]
Pack = Callable[[Path, int, int], Packing]


@pytest.fixture(scope="session")
def pack(vocabulary: Tokenizer) -> Pack:
    def make(records: Path, batch_size: int, max_length: int) -> Packing:
        encoder = Encoder(vocabulary)
        encoded = [encoder.encode(record) for record in read_lines(records)]
        steps = best_fit([len(e) for e in encoded], batch_size, max_length)
        batches = []
        for step in steps:
            # The table is in the order in which the records enter, the stream row by row.
            pairs = extension_pairs([encoded[n] for n in sorted(step.numbers)])
            batches.append(collate([encoded[n] for n in step.numbers], vocabulary, pairs))
        return encoded, steps, batches

    return make


def sizes_of(arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    """Rows of a step and tokens of a row, as a packing file has them."""
    return int(arrays["batch_size"]), int(arrays["max_length"])


@pytest.fixture(scope="session")
def packed(golden: Path, pack: Pack) -> dict[str, Packed]:
    result = {}
    for name in ("packing", "packing_tight"):
        arrays = dict(np.load(golden / f"{name}.npz"))
        records = golden / f"{name}_records.jsonl"
        result[name] = Packed(arrays, *pack(records, *sizes_of(arrays)))
    return result
