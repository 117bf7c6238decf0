"""The size of a data set, from its token index or, before there is one, from a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.in_context import Draw, InContextSamples
from cpm_bee.data.mixture import MixedIndex, Mixture
from cpm_bee.data.packing import PLAN_VERSION
from cpm_bee.data.record_pickle import decode
from cpm_bee.data.token_index.arrays import Arrays, TokenChunk
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import AnswerState, Encoder
from cpm_bee.errors import InputError, Problems
from cpm_bee.tokenizer import Tokenizer

IN_CONTEXT, NO_SAMPLES = "--incontext-weights", "none"  # a setting, which older states lack
SAMPLE = 1000  # records to read where there is no token index, which takes a fraction of a second


@dataclass(frozen=True)
class StepShape:
    """The settings that, with the lengths of the records, determine the plan of steps.

    Attributes:
        rows: the rows of `max_length` tokens in a step, over all ranks and micro-batches.
        drop_last: leave out the last steps, which have fewer rows.
        shuffle_seed: the seed for shuffling records and answers; None keeps both in order.
        in_context: the probability of 0, 1, 2, ... in-context samples; empty: there are none.
    """

    rows: int
    max_length: int
    drop_last: bool = False
    shuffle_seed: int | None = None
    in_context: tuple[float, ...] = ()

    def samples(
        self, lengths: np.ndarray, index: TokenIndex | MixedIndex | None = None
    ) -> InContextSamples | None:
        """Returns what draws in-context samples, from the `usable_lengths`; None if nothing is."""
        if not any(self.in_context[1:]):
            return None
        return InContextSamples(
            self.in_context,
            lengths,
            max_length=self.max_length,
            seed=self.shuffle_seed or 0,
            num_segments=None if index is None else index.num_segments,
            starts=index.starts if isinstance(index, MixedIndex) else None,
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.max_length

    def settings(self, dataset_fingerprint: str) -> dict[str, Any]:
        """Returns the settings that a resumed run must keep, as others would change its steps."""
        return {
            "records of --dataset": dataset_fingerprint,
            "rows of a step (--batch-size, --accumulate, processes)": self.rows,
            "--max-length": self.max_length,
            "--drop-last": self.drop_last,
            "--seed": self.shuffle_seed,
            "version of the plan of steps": PLAN_VERSION,
            IN_CONTEXT: ",".join(map(str, self.in_context)) or NO_SAMPLES,
        }


@dataclass(frozen=True)
class DataSize:
    """How many records of a data set are used for training or evaluation, and how many are not."""

    num_records: int  # that have an answer and fit into a row
    num_too_long: int
    min_steps: int  # in an epoch, if all rows were full: one or two less than there are
    num_unanswered: int = 0
    num_unwritable: int = 0  # of `num_records`, those whose answer generation cannot write
    # In the first epoch: the records that have 1, 2, ... in-context samples, and those that have
    # fewer than were drawn.
    in_context: tuple[int, ...] = ()
    num_shortened: int = 0

    @classmethod
    def of(
        cls, folder: Path | str, lengths: np.ndarray, answers: np.ndarray, shape: StepShape
    ) -> DataSize:
        """Computes the size from the lengths and answer states of all records.

        Raises:
            InputError: the data set is empty, no record has an answer or fits into a row, or
                `drop_last` leaves no step.
        """
        has_answer = (answers & AnswerState.KNOWN) > 0
        if len(lengths) and not has_answer.any():
            raise InputError(
                f'{folder}: none of its {len(lengths)} records has an answer ("<ans>" is empty in '
                "all of them), so there is nothing to learn or to compare with; data_reformat.py "
                "names the keys of the raw data that it did not use"
            )
        used = has_answer & (lengths <= shape.max_length)
        fitting = lengths[used]
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
        return cls(
            num_records=len(fitting),
            num_too_long=int(np.count_nonzero(has_answer)) - len(fitting),
            min_steps=steps,
            num_unanswered=int(np.count_nonzero(~has_answer)),
            num_unwritable=int(np.count_nonzero(used & ((answers & AnswerState.WRITABLE) == 0))),
        )

    def with_samples(self, draw: Draw, shape: StepShape, scale: float = 1) -> DataSize:
        """Returns the size with the in-context samples that an epoch draws.

        Args:
            scale: by how much there are more records than the draw is of.
        """
        tokens = int(draw.lengths[draw.lengths <= shape.max_length].sum(dtype=np.int64)) * scale
        return replace(
            self,
            min_steps=max(1, math.ceil(tokens / shape.tokens)),
            in_context=tuple(round(count * scale) for count in draw.counts()),
            num_shortened=round(draw.num_shortened * scale),
        )

    def mixed(self, drawn: np.ndarray, lengths: np.ndarray, shape: StepShape) -> DataSize:
        """Returns the size of an epoch of a mixture, given the records that one draws.

        Raises:
            InputError: the weights leave no record, or `drop_last` leaves no step.
        """
        if len(drawn) < (shape.rows if shape.drop_last else 1):
            raise InputError("--dataset: the weights leave too few records for a step")
        tokens = int(lengths[drawn].sum(dtype=np.int64))
        steps = max(1, -(-tokens // shape.tokens))
        return replace(self, num_records=len(drawn), min_steps=steps)


def usable_lengths(lengths: np.ndarray, answers: np.ndarray, max_length: int) -> np.ndarray:
    """Returns the lengths of records; those without an answer get one too long to be used."""
    has_answer = (answers & AnswerState.KNOWN) > 0
    return lengths if has_answer.all() else np.where(has_answer, lengths, max_length + 1)


class DataSurvey(NamedTuple):
    """What is known about a data set without writing a token index."""

    size: DataSize
    lengths: np.ndarray  # of the records that were read, with their in-context samples
    num_targets: np.ndarray  # of the same
    is_exact: bool  # all records were read; otherwise the size is an estimate


def survey(dataset: BinaryDataset | Mixture, tokenizer: Tokenizer, shape: StepShape) -> DataSurvey:
    """Survey a data set from its index or, if it has none, from its first `SAMPLE` records.

    Raises:
        InputError: as `DataSize.of`; or records are damaged or cannot be encoded (all are listed).
    """
    if isinstance(dataset, Mixture):
        return _survey_of_mixture(dataset, tokenizer, replace(shape, drop_last=False))
    index = TokenIndex.open_existing(dataset, tokenizer)
    if index is not None:
        lengths, num_targets, answers = index.lengths, index.num_targets, index.answers
    else:
        sample = _sample(dataset, tokenizer)
        lengths, num_targets, answers = sample["lengths"], sample["num_targets"], sample["answers"]
    is_exact, scale = len(lengths) >= len(dataset), 1.0
    if is_exact:
        size = DataSize.of(dataset.folder, lengths, answers, shape)
    else:
        scale = len(dataset) / len(lengths)
        size = _estimate(len(dataset), lengths, answers, shape)
    samples = shape.samples(usable_lengths(lengths, answers, shape.max_length), index)
    if samples is not None:
        size = size.with_samples(samples.draw(0), shape, scale)
        lengths = samples.draw(0).lengths
    return DataSurvey(size, lengths, num_targets, is_exact)


def _estimate(count: int, lengths: np.ndarray, answers: np.ndarray, shape: StepShape) -> DataSize:
    """Estimates the size of a data set of `count` records from its first ones."""
    scale = count / len(lengths)
    has_answer = (answers & AnswerState.KNOWN) > 0
    fitting = lengths[has_answer & (lengths <= shape.max_length)]
    answered = round(scale * np.count_nonzero(has_answer))
    records = min(answered, round(scale * len(fitting)))
    tokens = int(fitting.sum(dtype=np.int64)) * scale
    steps = max(1, round(tokens / shape.tokens))
    return DataSize(records, answered - records, steps, count - answered)


def _survey_of_mixture(mixture: Mixture, tokenizer: Tokenizer, shape: StepShape) -> DataSurvey:
    """Survey the datasets of a mixture; its steps are those of each, as often as its weight."""
    found = [survey(dataset, tokenizer, shape) for dataset in mixture.datasets]
    weights = [part.weight for part in mixture.parts]
    pairs = list(zip(found, weights, strict=True))
    counts = [[w * count for count in s.size.in_context] for s, w in pairs]
    size = DataSize(
        num_records=round(sum(s.size.num_records * w for s, w in pairs)),
        num_too_long=sum(s.size.num_too_long for s in found),
        min_steps=max(1, round(sum(s.size.min_steps * w for s, w in pairs))),
        num_unanswered=sum(s.size.num_unanswered for s in found),
        num_unwritable=sum(s.size.num_unwritable for s in found),
        in_context=tuple(round(sum(column)) for column in zip(*counts, strict=True)),
        num_shortened=round(sum(s.size.num_shortened * w for s, w in pairs)),
    )
    lengths, num_targets = (
        np.concatenate([getattr(s, name) for s in found]) for name in ("lengths", "num_targets")
    )
    return DataSurvey(size, lengths, num_targets, is_exact=False)


def _sample(dataset: BinaryDataset, tokenizer: Tokenizer) -> Arrays:
    """Returns the token arrays of the first records."""
    problems = Problems()
    chunk = TokenChunk(Encoder(tokenizer))
    for file, offset, payload in islice(dataset, SAMPLE):
        try:
            chunk.add(decode(payload))
        except InputError as error:
            problems.add(dataset.where(file, offset), str(error))
    kind = "records" if len(dataset) <= SAMPLE else f"of the first {SAMPLE} records, those"
    problems.raise_if_any(f"{dataset.folder}: {kind} that this model cannot read:")
    return chunk.arrays()
