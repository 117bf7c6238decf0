"""Several datasets with weights, which training reads as one (`--dataset A=2,B=0.5`).

The weight of a dataset is how often each of its records comes in an epoch. A fraction takes a part
of the records, another part in each epoch, until all have come equally often. Which records an
epoch has follows from seed and epoch alone, so the plan of steps is one plan as for one dataset:
the same on every rank and after a resume.

Records are numbered through all datasets. A batch has records of one dataset only (`split`), so
that its loss is that dataset's; records never see each other, so this changes no loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpm_bee.data.batch import Pair, Stream, pairs_up_to
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.in_context import InContextSamples
from cpm_bee.data.packing import PackedRow, Plan, generator
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.errors import InputError
from cpm_bee.records import Record


class Part(NamedTuple):
    """A dataset of a mixture."""

    folder: str
    weight: float


def parts_of(given: str) -> list[Part]:
    """The datasets that `--dataset` names: a folder, or `FOLDER=WEIGHT,FOLDER=WEIGHT`.

    A folder that exists under a name with `=` or `,` is taken as it is.

    Raises:
        InputError: a weight is not a number above 0, or a folder is named twice.
    """
    if Path(given).exists():
        return [Part(given, 1.0)]
    pieces = given.split(",")
    found: list[Part] = []
    while pieces:
        # The longest name that exists, since names may contain commas.
        for count in range(len(pieces), 0, -1):
            text = ",".join(pieces[:count])
            if count == 1 or Path(text).exists() or _names_folder(text):
                found.append(_part(text))
                del pieces[:count]
                break
    names = [part.folder for part in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--dataset {given}: {twice[0]} is named twice; give it a larger weight")
    return found


def _names_folder(text: str) -> bool:
    """Whether a text is a folder that exists and its weight."""
    folder, equals, weight = text.rpartition("=")
    return bool(equals) and Path(folder).exists() and not math.isnan(_number(weight))


def _number(text: str) -> float:
    """A number; not a number if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _part(text: str) -> Part:
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Part(text, 1.0)
    value = _number(weight)
    if not (folder and 0 < value < math.inf):
        raise InputError(f"--dataset {text}: expected FOLDER=WEIGHT, with a weight above 0")
    return Part(folder, value)


class Mixture:
    """Several datasets, opened.

    Attributes:
        folder: all of them with their weights, for messages.
        fingerprint: identifies the records and the weights.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.datasets = [BinaryDataset(part.folder) for part in parts]
        self.folder = ",".join(f"{part.folder}={part.weight:g}" for part in parts)

    @property
    def fingerprint(self) -> str:
        pairs = [(d.fingerprint, p.weight) for d, p in zip(self.datasets, self.parts, strict=True)]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def open_datasets(given: str) -> BinaryDataset | Mixture:
    """Open what `--dataset` names; one dataset of weight 1 is itself.

    Raises:
        InputError: as `parts_of`, or a dataset is damaged.
    """
    parts = parts_of(given)
    if len(parts) == 1 and parts[0].weight == 1:
        return BinaryDataset(parts[0].folder)
    return Mixture(parts)


class MixedIndex:
    """The token indexes of a mixture, with the interface of one.

    Attributes:
        dataset: the mixture.
        names: of its datasets, as they were given.
        lengths, num_targets, answers, extension_vocabulary: see `TokenIndex`.
    """

    def __init__(self, dataset: Mixture, indexes: Sequence[TokenIndex]) -> None:
        self.dataset = dataset
        self.names = [part.folder for part in dataset.parts]
        self._indexes = list(indexes)
        self.lengths = np.concatenate([index.lengths for index in indexes])
        self.num_targets = np.concatenate([index.num_targets for index in indexes])
        self.answers = np.concatenate([index.answers for index in indexes])
        self.extension_vocabulary = np.unique(
            np.concatenate([index.extension_vocabulary for index in indexes])
        )
        # The number of the first record of each dataset, and of all records.
        self.starts = np.cumsum([0, *(len(index) for index in indexes)])

    @property
    def num_segments(self) -> np.ndarray:
        """The number of segments of each record, int64."""
        return np.concatenate([index.num_segments for index in self._indexes])

    def part_of(self, numbers: Sequence[int]) -> np.ndarray:
        """The dataset of each record, int64 [len(numbers)]."""
        return np.searchsorted(self.starts, np.asarray(numbers, dtype=np.int64), side="right") - 1

    def split(self, numbers: Sequence[int]) -> list[list[int]]:
        """Records by dataset, in their order; without those datasets that have none of them."""
        parts = self.part_of(numbers).tolist()
        pairs = list(zip(numbers, parts, strict=True))
        return [[n for n, p in pairs if p == part] for part in sorted(set(parts))]

    def largest_subs(self, numbers: Sequence[int]) -> list[int]:
        largest = np.zeros(len(self.extension_vocabulary), dtype=np.int64)
        for own in self.split(numbers):
            index, local = self._local(own)
            places = np.searchsorted(self.extension_vocabulary, index.extension_vocabulary)
            np.maximum.at(largest, places, index.largest_subs(local))
        return largest.tolist()

    def extension_pairs(self, largest_subs: Sequence[int]) -> list[Pair]:
        return pairs_up_to(self.extension_vocabulary, largest_subs)

    def stream(
        self,
        numbers: Sequence[int],
        rng_of: Callable[[int], random.Random] | None = None,
        *,
        as_generated: bool = False,
    ) -> Stream:
        """The tokens of records of one dataset; see `TokenIndex.stream`."""
        index, local = self._local(numbers)
        if rng_of is None:
            return index.stream(local, as_generated=as_generated)
        start = numbers[0] - local[0]
        return index.stream(local, lambda n: rng_of(start + n), as_generated=as_generated)

    def source(self, number: int) -> Record:
        index, local = self._local([number])
        return index.source(local[0])

    def unwritable_answer(self, number: int) -> str:
        index, local = self._local([number])
        return index.unwritable_answer(local[0])

    def _local(self, numbers: Sequence[int]) -> tuple[TokenIndex, list[int]]:
        (part,) = set(self.part_of(numbers).tolist())
        start = int(self.starts[part])
        return self._indexes[part], [int(number) - start for number in numbers]


class MixedPlan:
    """The rows of every row stream in every epoch; see `Plan`, which plans each epoch.

    Args:
        samples: gives the lengths of records in each epoch, if these have in-context samples.
    """

    def __init__(
        self,
        index: MixedIndex,
        lengths: np.ndarray,
        *,
        rows: int,
        max_length: int,
        seed: int,
        samples: InContextSamples | None = None,
    ) -> None:
        self._lengths = lengths
        self._samples = samples
        self._rows, self._max_length, self._seed = rows, max_length, seed
        usable = lengths <= max_length
        self._records = [
            begin + np.flatnonzero(usable[begin:end])
            for begin, end in zip(index.starts[:-1], index.starts[1:], strict=True)
        ]
        self._weights = [part.weight for part in index.dataset.parts]

    def drawn(self, epoch: int) -> np.ndarray:
        """The records of an epoch, each as often as it comes."""
        found = []
        for part, (records, weight) in enumerate(zip(self._records, self._weights, strict=True)):
            whole = int(weight)
            count = round((weight - whole) * len(records))
            order = generator(self._seed, 0, part, 0).permutation(len(records))
            # A window that moves on with each epoch.
            window = order[np.arange(epoch * count, (epoch + 1) * count) % max(1, len(records))]
            found += [np.tile(records, whole), records[np.sort(window)]]
        return np.concatenate(found)

    def steps(self, epoch: int, row_streams: Sequence[int]) -> Iterator[list[PackedRow]]:
        drawn = self.drawn(epoch)
        lengths = self._lengths if self._samples is None else self._samples.draw(epoch).lengths
        plan = Plan(
            lengths[drawn],
            rows=self._rows,
            max_length=self._max_length,
            shuffle_seed=self._seed,
        )
        for rows in plan.steps(epoch, row_streams):
            yield [drawn[row].tolist() for row in rows]
