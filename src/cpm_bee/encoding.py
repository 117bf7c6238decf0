"""Record -> tokens, segments and the relations between segments (SPEC §3)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cpm_bee.errors import InputError
from cpm_bee.records import ANSWER, Record, Tree
from cpm_bee.tokenizer import ExtensionTable, Piece, Tokenizer

MAX_DEPTH = 8  # relations distinguish at most this many levels up and down
MAX_PARTS = np.iinfo(np.uint16).max  # segments and subs are stored in 16 bits

# Texts up to this length are looked up in a cache: field names, options, the question.
_CACHED_LENGTH = 24
_CACHE_SIZE = 65_536


class Segment(NamedTuple):
    """One node of the record's tree: a key or a string leaf, in depth-first order."""

    text: str
    depth: int
    is_predicted: bool


class Shape(NamedTuple):
    """What the relations of a record depend on: depth and role of each of its S segments."""

    depths: tuple[int, ...]
    predicted: tuple[bool, ...]

    @property
    def relations(self) -> np.ndarray:
        """Buckets of all ordered pairs of segments, uint8 [S, S]."""
        return _relations(self.depths)


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """The n tokens of a record.

    Attributes:
        ids: vocabulary ids, int32 [n].
        subs: which extension entry of its id a token is (0 for ordinary tokens), uint16 [n].
        segments: the segment of each token, uint16 [n].
        shape: the segments' depths and roles.
    """

    ids: np.ndarray
    subs: np.ndarray
    segments: np.ndarray
    shape: Shape

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> np.ndarray:
        """True where a token is given, False where it belongs to an answer; bool [n]."""
        return ~np.asarray(self.shape.predicted, dtype=bool)[self.segments]


def walk(record: Record, rng: random.Random | None = None) -> Iterator[Segment]:
    """The segments of a record; with `rng`, dictionaries under `<ans>` are shuffled."""
    yield Segment("<root>", 0, False)
    yield from _walk(record, 1, False, rng)


def _walk(
    node: dict[str, Tree], depth: int, under_answer: bool, rng: random.Random | None
) -> Iterator[Segment]:
    items = list(node.items())
    if under_answer and rng is not None:
        rng.shuffle(items)
    for key, value in items:
        answer = under_answer or (depth == 1 and key == ANSWER)
        yield Segment(key, depth, False)
        if isinstance(value, str):
            yield Segment(value, depth + 1, answer)
        else:
            yield from _walk(value, depth + 1, answer, rng)


def is_shuffled(record: Record) -> bool:
    """Whether training shuffles anything: some dictionary under `<ans>` has two items or more."""

    def has_choice(node: Tree) -> bool:
        return isinstance(node, dict) and (len(node) > 1 or any(map(has_choice, node.values())))

    return has_choice(record[ANSWER])


@lru_cache(maxsize=4096)
def _relations(depths: tuple[int, ...]) -> np.ndarray:
    # In depth-first order the lowest common ancestor of a and a later b lies at the least of
    # depth(a) and depth(i) - 1 for the segments i after a, up to and including b.
    depth = np.asarray(depths)
    common = np.empty((len(depth), len(depth)), dtype=np.int64)  # (S, S)
    for a in range(len(depth)):
        steps = np.concatenate([depth[a : a + 1], depth[a + 1 :] - 1])
        common[a, a:] = common[a:, a] = np.minimum.accumulate(steps)
    up = np.minimum(depth[:, None] - common, MAX_DEPTH - 1)
    down = np.minimum(depth[None, :] - common, MAX_DEPTH - 1)
    bucket = up * MAX_DEPTH + down
    result = np.where(bucket > 0, bucket + 1, 0).astype(np.uint8)
    np.fill_diagonal(result, 0)
    result.setflags(write=False)
    return result


class Extension(NamedTuple):
    """A record's extension table and the (id, sub) pair of each of its entries."""

    table: ExtensionTable
    pairs: tuple[tuple[int, int], ...]


class _Subs:
    """Turns ids of a record's extension table into (id, sub) pairs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.table = ExtensionTable(len(tokenizer))
        self.pairs: list[tuple[int, int]] = []
        self._counts: dict[int, int] = {}

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, self.table)
        self._number_new()
        return ids

    def id_of(self, piece: Piece) -> int:
        token_id = self.table.id_of(piece)
        self._number_new()
        return token_id

    def _number_new(self) -> None:
        if len(self.table) == len(self.pairs):
            return
        for piece in self.table.pieces[len(self.pairs) :]:
            category = self._tokenizer.category(piece)
            sub = self._counts.get(category, 0)
            self._counts[category] = sub + 1
            self.pairs.append((category, sub))


class Encoder:
    """Encodes records with one vocabulary; not for use by several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ordinary: dict[str, list[int]] = {}
        self._markup: dict[str, Piece] = {}  # texts that are one unlisted special token

    def encode(
        self, record: Record, *, rng: random.Random | None = None, answers: bool = True
    ) -> EncodedRecord:
        """Encode a valid record (see `records.validate`).

        Args:
            rng: shuffles the dictionaries under `<ans>`, as training does.
            answers: without them, predicted segments keep their number but have no tokens, which
                is the prompt of generation.

        Raises:
            InputError: a special token whose name the vocabulary lacks; more than 65,535 segments
                or extension entries.
        """
        return self.encode_segments(list(walk(record, rng)), answers=answers)[0]

    def encode_segments(
        self, segments: list[Segment], *, answers: bool = True
    ) -> tuple[EncodedRecord, Extension]:
        """Like `encode`, from segments; also returns the record's extension, for decoding."""
        bos, eos, vocab_size = self.tokenizer.bos, self.tokenizer.eos, len(self.tokenizer)
        subs_of = _Subs(self.tokenizer)
        ids: list[int] = []
        lengths: list[int] = []
        for text, _, is_predicted in segments:
            begin = len(ids)
            if answers or not is_predicted:
                ids.append(bos)
                ids += self._ids(text, subs_of)
                if not is_predicted:
                    ids.append(eos)
            lengths.append(len(ids) - begin)
        if max(len(segments), len(subs_of.pairs)) > MAX_PARTS:
            raise InputError(f"the record has more than {MAX_PARTS} fields or unknown words")
        token_ids = np.array(ids, dtype=np.int32)  # (n,)
        subs = np.zeros(len(ids), dtype=np.uint16)
        if subs_of.pairs:
            pairs = np.array(subs_of.pairs, dtype=np.int32)  # (extension entries, 2)
            places = np.flatnonzero(token_ids >= vocab_size)
            found = pairs[token_ids[places] - vocab_size]
            token_ids[places], subs[places] = found[:, 0], found[:, 1]
        encoded = EncodedRecord(
            ids=token_ids,
            subs=subs,
            segments=np.repeat(np.arange(len(segments), dtype=np.uint16), lengths),
            shape=Shape(tuple(s.depth for s in segments), tuple(s.is_predicted for s in segments)),
        )
        return encoded, Extension(subs_of.table, tuple(subs_of.pairs))

    def _ids(self, text: str, subs_of: _Subs) -> list[int]:
        cached = self._ordinary.get(text)
        if cached is not None:
            return cached
        piece = self._markup.get(text)
        if piece is not None:
            return [subs_of.id_of(piece)]
        ids = subs_of.encode(text)
        if len(text) <= _CACHED_LENGTH:
            self._remember(text, ids, subs_of.table)
        return ids

    def _remember(self, text: str, ids: list[int], table: ExtensionTable) -> None:
        if len(self._ordinary) + len(self._markup) >= _CACHE_SIZE:
            self._ordinary.clear()
            self._markup.clear()
        # Ids of the extension mean something within one record only.
        if not ids or max(ids) < len(self.tokenizer):
            self._ordinary[text] = ids
        elif len(ids) == 1 and table[ids[0]].is_special:
            self._markup[text] = table[ids[0]]
