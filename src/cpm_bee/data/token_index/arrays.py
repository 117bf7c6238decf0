"""The tokens of many records as arrays, in the form that a token index stores.

Records are encoded in chunks, and a chunk is handled as whole arrays: NumPy calls for each record
would take longer than encoding it. Each array has one item per record, per token, or per extension
(`COUNTED`); an extension is the largest sub of an id in a record, if above 0. So three numbers
locate the beginning of a run of records in all arrays, and records are reordered (`take`), split
and joined without visiting each one.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cpm_bee.encoding import AnswerState, Encoder, TokenLists
from cpm_bee.records import Record
from cpm_bee.segments import SegmentTree, is_shuffled, outline

# The arrays of an index by file name: their dtype, and what they have one item for.
ARRAYS: dict[str, tuple[type, str]] = {
    "lengths": (np.int32, "records"),
    "num_targets": (np.int32, "records"),
    "trees": (np.int32, "records"),
    "shuffled": (np.bool_, "records"),
    "answers": (np.uint8, "records"),
    "extension_counts": (np.int32, "records"),
    "files": (np.int32, "records"),
    "offsets": (np.int64, "records"),
    "ids": (np.int32, "tokens"),
    "subs": (np.uint16, "tokens"),
    "segments": (np.uint16, "tokens"),
    "extension_ids": (np.int32, "extensions"),
    "extension_subs": (np.uint16, "extensions"),
}
# A record's address, known once it is in a dataset: the number of its data file, the byte offset.
ADDRESS_ARRAYS = ("files", "offsets")
_CHUNK_ARRAYS = [name for name in ARRAYS if name not in ADDRESS_ARRAYS]
COUNTED = ("records", "tokens", "extensions")

# Arrays by name, of consecutive records.
Arrays = dict[str, np.ndarray]


def counts_of(arrays: Arrays) -> np.ndarray:
    """The numbers of records, tokens and extensions (see `COUNTED`), int64 [3]."""
    return np.array([len(arrays[name]) for name in ("lengths", "ids", "extension_ids")])


class TokenChunk:
    """Encodes records one by one; `arrays` returns all their arrays except `ADDRESS_ARRAYS`.

    Attributes:
        trees: the distinct trees; the array `trees` has indices into this list.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._tokens = TokenLists(ids=array("i"), segment_lengths=array("i"))
        self._predicted: list[bool] = []  # of each segment
        self._num_segments = array("i")
        self._record_ends = array("q")  # in tokens
        self._shuffled: list[bool] = []
        self._answers = bytearray()  # the `AnswerState` of each record
        self._tree_numbers = array("i")
        self._numbers: dict[int, int] = {}  # identity of a tree -> its number
        self.trees: list[SegmentTree] = []

    def __len__(self) -> int:
        return len(self._num_segments)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens.ids)

    def add(self, record: Record) -> AnswerState:
        """Encode a valid record; returns the state of its answer.

        Raises:
            InputError: see `Encoder.encode`; the record is left out.
        """
        texts, tree = segments = outline(record)
        extension = self._encoder.append(segments, self._tokens)
        state = self._encoder.answer_state(segments, extension)
        self._answers.append(state)
        self._predicted += tree.predicted
        self._num_segments.append(len(texts))
        self._record_ends.append(len(self._tokens.ids))
        self._shuffled.append(is_shuffled(record))
        number = self._numbers.get(id(tree))  # hashing the tree itself would be slow
        if number is None:
            number = self._numbers[id(tree)] = len(self.trees)
            self.trees.append(tree)
        self._tree_numbers.append(number)
        return state

    def arrays(self) -> Arrays:
        ids = np.array(self._tokens.ids, dtype=np.int32)
        ends = np.array(self._record_ends, dtype=np.int64)
        segment_lengths = np.array(self._tokens.segment_lengths, dtype=np.int32)
        num_segments = np.array(self._num_segments, dtype=np.int64)
        first_segments = np.cumsum(num_segments) - num_segments
        numbers = np.arange(len(segment_lengths)) - first_segments.repeat(num_segments)
        targets = np.where(np.array(self._predicted, dtype=np.bool_), segment_lengths, 0)
        target_ends = np.concatenate([[0], np.cumsum(targets, dtype=np.int64)])
        positions, subs = np.array(self._tokens.subs, dtype=np.int64).reshape(-1, 2).T
        record, extension_ids, extension_subs = _largest_subs(
            np.searchsorted(ends, positions, side="right"), ids[positions], subs
        )
        all_subs = np.zeros(len(ids), dtype=np.uint16)
        all_subs[positions] = subs
        values: dict[str, Any] = {
            "lengths": np.diff(ends, prepend=0),
            "num_targets": target_ends[first_segments + num_segments] - target_ends[first_segments],
            "trees": self._tree_numbers,
            "shuffled": self._shuffled,
            "answers": np.frombuffer(self._answers, dtype=np.uint8),
            "extension_counts": np.bincount(record, minlength=len(self)),
            "ids": ids,
            "subs": all_subs,
            "segments": numbers.astype(np.uint16).repeat(segment_lengths),
            "extension_ids": extension_ids,
            "extension_subs": extension_subs,
        }
        return {name: np.asarray(values[name], dtype=ARRAYS[name][0]) for name in _CHUNK_ARRAYS}


def _largest_subs(
    record: np.ndarray, ids: np.ndarray, subs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest sub of each id in each record, sorted by record and id."""
    order = np.lexsort((subs, ids, record))
    record, ids, subs = record[order], ids[order], subs[order]
    is_last = np.ones(len(order), dtype=np.bool_)
    is_last[:-1] = (np.diff(record) != 0) | (np.diff(ids) != 0)
    return record[is_last], ids[is_last], subs[is_last]


def take(arrays: Arrays, order: np.ndarray) -> Arrays:
    """The same records in another order."""
    sizes = {"tokens": arrays["lengths"], "extensions": arrays["extension_counts"]}
    positions = {counted: _positions(lengths, order) for counted, lengths in sizes.items()}
    return {
        name: values[order if ARRAYS[name][1] == "records" else positions[ARRAYS[name][1]]]
        for name, values in arrays.items()
    }


def _positions(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The positions of the items of runs with `lengths`, with the runs reordered by `order`."""
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    lengths = lengths[order]
    shifts = starts[order] - (np.cumsum(lengths, dtype=np.int32) - lengths)
    positions = np.arange(lengths.sum(), dtype=np.int32)
    positions += np.repeat(shifts, lengths)
    return positions


def split(arrays: Arrays, ends: np.ndarray) -> Iterator[Arrays]:
    """Split into consecutive parts that end before each of `ends` (see `ends_of`)."""
    for begin, end in itertools.pairwise([[0] * len(COUNTED), *ends.tolist()]):
        part = dict(zip(COUNTED, map(slice, begin, end), strict=True))
        yield {name: values[part[ARRAYS[name][1]]] for name, values in arrays.items()}


def ends_of(arrays: Arrays, sizes: Sequence[int]) -> np.ndarray:
    """Where parts of `sizes` records end, counted as in `COUNTED`; int64 [parts, 3]."""
    records = np.cumsum(sizes, dtype=np.int64)
    counts = [arrays["lengths"], arrays["extension_counts"]]
    tokens, extensions = (np.concatenate([[0], np.cumsum(c, dtype=np.int64)]) for c in counts)
    return np.stack([records, tokens[records], extensions[records]], axis=1)


def to_bytes(arrays: Arrays) -> Iterator[bytes]:
    return (arrays[name].tobytes() for name in _CHUNK_ARRAYS)


def from_bytes(data: memoryview, num_records: int) -> Arrays:
    """The arrays that `to_bytes` wrote."""
    arrays: Arrays = {}
    sizes = {"records": num_records}
    offset = 0
    for name in _CHUNK_ARRAYS:
        dtype, counted = ARRAYS[name]
        values: np.ndarray = np.frombuffer(data, dtype=dtype, count=sizes[counted], offset=offset)
        offset += values.nbytes
        arrays[name] = values
        if name == "lengths":
            sizes["tokens"] = int(values.sum())
        elif name == "extension_counts":
            sizes["extensions"] = int(values.sum())
    return arrays


def join(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in _CHUNK_ARRAYS}
