"""Reads the token index: a dataset's tokens, encoded once and memory-mapped.

The index is a folder of flat files, one array each (`arrays.ARRAYS`), and `index.json`. The ids of
all records are concatenated; the records' lengths determine where each begins. A dataset has few
distinct segment trees: they are in `index.json`, and each record has the number of its tree. A
batch is made by slicing the mapped arrays. No record is parsed or tokenised during training, except
those whose answer is a dictionary that training shuffles: these are encoded again.

An index can always be rebuilt from the records, so one that is missing, stale or damaged is simply
made again. Its folder, inside the dataset's, is named after the vocabulary; the dataset's own files
are never changed. A small index is compared with its checksums as a whole when it is opened. Of a
large one, only the arrays with one item per record are, and each block of the others when a batch
first needs it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpm_bee.data.batch import Pair, Stream, pairs_up_to
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.arrays import ARRAYS
from cpm_bee.data.token_index.soundness import (
    UNREADABLE,
    ArrayBlocks,
    check_arrays,
    is_within,
    read_info,
    read_trees,
)
from cpm_bee.data.token_index.writer import CHECKSUMS, INFO, build, folder_name
from cpm_bee.encoding import AnswerState, EncodedRecord, Encoder
from cpm_bee.errors import DamagedFile
from cpm_bee.files import BusyError, atomic_folder, exclusive
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The errors for a folder that cannot be written; EROFS is not a PermissionError.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


_MAKING = "is making the token index"
_WAIT = (
    "start this run again when that is done, or make the index beforehand "
    "(preprocess_dataset.py --vocab)"
)


class TokenIndex:
    """The encoded records of a dataset; open one with `TokenIndex.of`.

    Attributes:
        lengths: the number of tokens of each record, int32 [R].
        num_targets: the number of targets of each record, int32 [R].
        answers: the `encoding.AnswerState` of each record, uint8 [R].
        extension_vocabulary: the ids that have a sub > 0 in some record, sorted, int64 [V].
    """

    def __init__(self, folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        info = read_info(folder / INFO)
        if info["dataset"] != dataset.fingerprint or info["vocabulary"] != tokenizer.fingerprint:
            raise ValueError("made from other data")
        maps = {
            name: _map(folder / name, dtype, info[counted], scattered=counted != "records")
            for name, (dtype, counted) in ARRAYS.items()
        }
        self._folder = folder
        self._blocks = ArrayBlocks(folder, maps, info.get(CHECKSUMS), self._remedy)
        # Faster to slice than numpy.memmap.
        arrays: dict[str, np.ndarray] = {
            name: np.frombuffer(maps[name], dtype=dtype) for name, (dtype, _) in ARRAYS.items()
        }
        self._trees = read_trees(info)
        check_arrays(arrays, info, len(self._trees), len(dataset.files), len(tokenizer))
        self._vocab_size = len(tokenizer)
        self.dataset = dataset
        self.lengths = arrays["lengths"]
        self.num_targets = arrays["num_targets"]
        self.answers = arrays["answers"]
        self.extension_vocabulary = np.array(info["extension_vocabulary"], dtype=np.int64)
        self._arrays = arrays
        self._starts = _starts(self.lengths)
        self._extension_starts = _starts(arrays["extension_counts"])
        self._num_segments = np.array([len(s.depths) for s in self._trees], dtype=np.int64)
        self._segment_starts = _starts(self._num_segments)
        # Whether a segment is given (not predicted), for the concatenated segments of all trees.
        self._given = ~np.array([p for s in self._trees for p in s.predicted], dtype=np.bool_)
        self._encoder = Encoder(tokenizer)
        self._keep: Any = None  # a temporary folder lives as long as its index

    @classmethod
    def of(
        cls, dataset: BinaryDataset, tokenizer: Tokenizer, *, refuse_busy: bool = False
    ) -> TokenIndex:
        """Open the index of a dataset for a vocabulary; make it first if necessary.

        Where another process is making it at this moment, a temporary one is made, as by the
        processes of a machine that has its own copy of the data.

        Args:
            refuse_busy: raise `BusyError` in that case.

        Raises:
            InputError: some records cannot be encoded; all are listed.
        """
        if (existing := cls.open_existing(dataset, tokenizer, quiet=True)) is not None:
            return existing
        folder = dataset.folder / folder_name(tokenizer)
        try:
            with exclusive(
                folder.with_name(f".{folder.name}.lock"), f"{_MAKING} {folder}; {_WAIT}"
            ):
                if (existing := cls.open_existing(dataset, tokenizer)) is not None:
                    return existing  # made while we came for the lock
                with atomic_folder(folder, replace=True) as new:
                    build(new, dataset, tokenizer)
            return cls(folder, dataset, tokenizer)
        except (OSError, BusyError) as error:
            if isinstance(error, BusyError) and refuse_busy:
                raise
            if isinstance(error, OSError) and error.errno not in _READ_ONLY:
                raise
            # Read-only data, or another run is making the same index: make a temporary one.
            own = tempfile.TemporaryDirectory(prefix="cpm_bee-token_index-")
            build(Path(own.name), dataset, tokenizer)
            index = cls(Path(own.name), dataset, tokenizer)
            index._keep = own
            return index

    @classmethod
    def open_existing(
        cls, dataset: BinaryDataset, tokenizer: Tokenizer, *, quiet: bool = False
    ) -> TokenIndex | None:
        """Open the index without making one; None if it is missing, stale or damaged.

        Warns of a checksum that differs, unless `quiet`.
        """
        dataset.fingerprint  # noqa: B018 - raises if the dataset itself is damaged
        try:
            with contextlib.suppress(OSError, *UNREADABLE):
                return cls(dataset.folder / folder_name(tokenizer), dataset, tokenizer)
        except DamagedFile as error:
            if not quiet:
                reason, *_ = str(error).splitlines()
                logger.warning(f"{reason}; the token index has to be made again")
        return None

    @property
    def _remedy(self) -> str:
        return f"remove the token index (rm -r {self._folder}), and the next run makes it again"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_segments(self) -> np.ndarray:
        """The number of segments of each record, int64 [R]."""
        return self._num_segments[self._arrays["trees"]]

    def record(self, number: int, rng: random.Random | None = None) -> EncodedRecord:
        """A record's tokens; `rng` shuffles the dictionaries of its answer (docs/format.md §3)."""
        a = self._arrays
        tokens = slice(self._starts[number], self._starts[number + 1])
        tree = self._trees[a["trees"][number]]
        if rng is not None and a["shuffled"][number]:
            record = self._encoder.encode(self.source(number), rng=rng)
            same_size = len(record) == tokens.stop - tokens.start
            self._require(same_size and len(record.tree.depths) == len(tree.depths))
            return record
        self._blocks.check("tokens", *self._starts[number : number + 2, None])
        ids, segments = a["ids"][tokens], a["segments"][tokens]
        self._require(is_within(ids, self._vocab_size) and is_within(segments, len(tree.depths)))
        return EncodedRecord(ids=ids, subs=a["subs"][tokens], segments=segments, tree=tree)

    def _require(self, sound: bool) -> None:
        # The token arrays are first read when batches are made, so damage shows up only then.
        if not sound:
            raise DamagedFile(f"{self._folder}: this token index is damaged\n{self._remedy}")

    def source(self, number: int) -> Record:
        """The record in the dataset."""
        return self.dataset.read(*self.location(number))

    def unwritable_answer(self, number: int) -> str:
        """The location of a record and the parts of its answer that generation cannot write."""
        pieces = self._encoder.unwritable_pieces(self.source(number))
        return f"{self.dataset.where(*self.location(number))}: {', '.join(map(repr, pieces))}"

    def location(self, number: int) -> tuple[int, int]:
        """The number of a record's data file and the byte offset in it."""
        return int(self._arrays["files"][number]), int(self._arrays["offsets"][number])

    def stream(
        self,
        numbers: Sequence[int],
        rng_of: Callable[[int], random.Random] | None = None,
        *,
        as_generated: bool = False,
    ) -> Stream:
        """The tokens of some records; equal to `Stream.of` their `record`s, but faster.

        Args:
            rng_of: returns the generator that shuffles the answer of a record, given its number.
            as_generated: number each record's extension entries as in generation.
        """
        a = self._arrays
        chosen = np.asarray(numbers, dtype=np.int64)
        lengths = self.lengths[chosen].astype(np.int64)
        trees = a["trees"][chosen]
        begins = self._starts[chosen]
        self._blocks.check("tokens", begins, begins + lengths)
        tokens = _positions(begins, lengths)  # (T,)
        segments = a["segments"][tokens]
        ids, subs = a["ids"][tokens], a["subs"][tokens]
        self._require(
            is_within(ids, self._vocab_size)
            and bool((segments < np.repeat(self._num_segments[trees], lengths)).all())
            and self._has_pairs(numbers, ids, subs)
        )
        context = self._given[np.repeat(self._segment_starts[trees], lengths) + segments]
        self._require(int((~context).sum()) == int(self.num_targets[chosen].sum(dtype=np.int64)))
        relations = [self._trees[tree].relations.ravel() for tree in trees.tolist()]
        stream = Stream(
            ids=ids,
            subs=subs,
            segments=segments,
            context=context,
            lengths=lengths,
            num_segments=self._num_segments[trees],
            relations=np.concatenate([np.empty(0, dtype=np.uint8), *relations]),
        )
        if rng_of is not None:
            for i in np.flatnonzero(a["shuffled"][chosen]).tolist():
                stream.replace(i, self.record(numbers[i], rng_of(numbers[i])))
        if as_generated:
            for i in np.flatnonzero(self.answers[chosen] & AnswerState.RENUMBERED).tolist():
                record = self._encoder.encode_as_generated(self.source(numbers[i]))
                size = self._num_segments[trees[i]]
                self._require(len(record) == lengths[i] and len(record.tree.depths) == size)
                stream.replace(i, record)
        return stream

    def _has_pairs(self, numbers: Sequence[int], ids: np.ndarray, subs: np.ndarray) -> bool:
        """Whether the tokens' (id, sub) pairs are within the `largest_subs` of their records."""
        positions = np.flatnonzero(subs)
        if not len(positions):
            return True
        known = np.zeros(self._vocab_size, dtype=np.uint16)
        known[self.extension_vocabulary] = self.largest_subs(numbers)
        return bool((subs[positions] <= known[ids[positions]]).all())

    def largest_subs(self, numbers: Sequence[int]) -> list[int]:
        """The largest sub of each id of `extension_vocabulary` in some records; 0 if none."""
        chosen = np.asarray(numbers, dtype=np.int64)
        counts = self._arrays["extension_counts"][chosen]
        begins = self._extension_starts[chosen]
        self._blocks.check("extensions", begins, begins + counts)
        own = _positions(begins, counts)
        extension_ids = self._arrays["extension_ids"][own]
        self._require(bool(np.isin(extension_ids, self.extension_vocabulary).all()))
        ids = np.searchsorted(self.extension_vocabulary, extension_ids)
        largest = np.zeros(len(self.extension_vocabulary), dtype=np.uint16)
        np.maximum.at(largest, ids, self._arrays["extension_subs"][own])
        return largest.tolist()

    def extension_pairs(self, largest_subs: Sequence[int]) -> list[Pair]:
        """The distinct (id, sub > 0) pairs, sorted, of records with these largest subs."""
        return pairs_up_to(self.extension_vocabulary, largest_subs)


def _positions(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenated positions of runs that begin at `starts` and have `counts` items."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _map(path: Path, dtype: type, count: int, *, scattered: bool) -> mmap.mmap | bytes:
    """A file in memory; `scattered` if it will be read in random order."""
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: wrong size")
    if not count:
        return b""  # an empty file cannot be mapped
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        # Read-ahead, up to megabytes per record, would make the first step take seconds.
        memory.madvise(mmap.MADV_RANDOM)
    return memory
