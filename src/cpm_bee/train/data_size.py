"""How much there is to train on: from a token index or, before there is one, from some records."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.packing import PLAN_VERSION
from cpm_bee.data.record_pickle import decode
from cpm_bee.data.token_index.arrays import TokenChunk
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError, Problems
from cpm_bee.tokenizer import Tokenizer

SAMPLE = 1000  # records that are read where there is no token index: a fraction of a second


@dataclass(frozen=True)
class StepShape:
    """What makes the plan of a run's steps, beside the lengths of the records.

    Attributes:
        rows: rows of `max_length` tokens of a step, over all ranks and micro-steps.
        drop_last: leave out the last steps, which have fewer rows.
        shuffle_seed: of the order and of shuffled answers; None keeps both, as evaluation does.
    """

    rows: int
    max_length: int
    drop_last: bool = False
    shuffle_seed: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.max_length

    def settings(self, dataset_fingerprint: str) -> dict[str, Any]:
        """What a resumed run must have as before: with other values, a step is another one."""
        return {
            "records of --dataset": dataset_fingerprint,
            "rows of a step (--batch-size, --accumulate, processes)": self.rows,
            "--max-length": self.max_length,
            "--drop-last": self.drop_last,
            "--seed": self.shuffle_seed,
            "version of the plan of steps": PLAN_VERSION,
        }


@dataclass(frozen=True)
class DataSize:
    """What is trained on, or evaluated on, of a data set."""

    num_records: int  # that fit into a row
    num_too_long: int
    min_steps: int  # of an epoch, if all rows were full: one or two less than there are

    @classmethod
    def of(cls, folder: Path, lengths: np.ndarray, shape: StepShape) -> DataSize:
        """The size from the tokens of all records.

        Raises:
            InputError: the data set is empty, no record fits into a row, or `drop_last` leaves no
                step.
        """
        fitting = lengths[lengths <= shape.max_length]
        if not len(fitting):
            longest = f" (the longest has {lengths.max()} tokens)" if len(lengths) else ""
            raise InputError(
                f"{folder}: none of its {len(lengths)} records fits into --max-length "
                f"{shape.max_length}{longest}"
            )
        # A row stream with a record has a row.
        if shape.drop_last and len(fitting) < shape.rows:
            raise InputError(
                f"--drop-last leaves nothing: {folder} does not fill one step of {shape.rows} rows"
            )
        tokens = int(fitting.sum(dtype=np.int64))
        steps = max(1, -(-tokens // shape.tokens))
        return cls(len(fitting), len(lengths) - len(fitting), steps)


class DataSurvey(NamedTuple):
    """What can be known of a data set without writing a token index."""

    size: DataSize
    lengths: np.ndarray  # of the records that were looked at, and their targets
    num_targets: np.ndarray
    is_exact: bool  # all records were looked at; else the size is an estimate


def survey(dataset: BinaryDataset, tokenizer: Tokenizer, shape: StepShape) -> DataSurvey:
    """Look at a data set's index, or at its first `SAMPLE` records where there is none.

    Writes nothing.

    Raises:
        InputError: as `DataSize.of`; or records that were looked at are damaged or cannot be
            encoded, all of which are listed.
    """
    index = TokenIndex.open_existing(dataset, tokenizer)
    if index is not None:
        size = DataSize.of(dataset.folder, index.lengths, shape)
        return DataSurvey(size, index.lengths, index.num_targets, is_exact=True)
    lengths, num_targets = _sample(dataset, tokenizer)
    if len(lengths) >= len(dataset):
        size = DataSize.of(dataset.folder, lengths, shape)
        return DataSurvey(size, lengths, num_targets, is_exact=True)
    fitting = lengths[lengths <= shape.max_length]
    records = round(len(dataset) * len(fitting) / len(lengths))
    tokens = int(fitting.sum(dtype=np.int64)) * len(dataset) / len(lengths)
    steps = max(1, round(tokens / shape.tokens))
    size = DataSize(records, len(dataset) - records, steps)
    return DataSurvey(size, lengths, num_targets, is_exact=False)


def _sample(dataset: BinaryDataset, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the targets of the first records."""
    problems = Problems()
    chunk = TokenChunk(Encoder(tokenizer))
    for file, offset, payload in islice(dataset, SAMPLE):
        try:
            chunk.add(decode(payload))
        except InputError as error:
            problems.add(dataset.where(file, offset), str(error))
    kind = "records" if len(dataset) <= SAMPLE else f"of the first {SAMPLE} records, those"
    problems.raise_if_any(f"{dataset.folder}: {kind} that this model cannot read:")
    arrays = chunk.arrays()
    return arrays["lengths"], arrays["num_targets"]
