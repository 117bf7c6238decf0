"""`Batch`: the records of one step as a flat stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from cpm_bee.encoding import EncodedRecord
from cpm_bee.segments import HIDDEN
from cpm_bee.tokenizer import Tokenizer

Pair = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """R concatenated records with T tokens and N targets in total.

    Records do not attend to each other (docs/format.md §4), so the loss equals that of any padded
    layout, without the padding.
    """

    ids: torch.Tensor  # (T,) int64, vocabulary ids
    subs: torch.Tensor  # (T,) int64, number of the extension entry of its id; 0 if ordinary
    segments: torch.Tensor  # (T,) int64, segment within its record
    context: torch.Tensor  # (T,) bool, given (True) or to be predicted (False)
    lengths: tuple[int, ...]  # (R,) tokens of each record
    num_segments: tuple[int, ...]  # (R,)
    relations: torch.Tensor  # (sum of num_segments squared,) uint8, buckets of segment pairs
    target_positions: torch.Tensor  # (N,) int64, positions in the stream that predict
    targets: torch.Tensor  # (N,) int64, from vocab_size on: index into the extension entries
    target_records: torch.Tensor  # (N,) int64, the record of each target
    extension_ids: torch.Tensor  # (E,) int64, the (id, sub > 0) pairs that the step can predict
    extension_subs: torch.Tensor  # (E,) int64
    # What generation may write for a record besides the ordinary vocabulary; None in training.
    unk_is_candidate: torch.Tensor | None = None  # (R,) bool
    extension_is_candidate: torch.Tensor | None = None  # (R, E) bool
    unk: int = 0  # id of <unk>, used with these two
    # The pairs of each record; without it, the pairs of all records compete at each target, as in
    # the reference's training.
    extension_is_own: torch.Tensor | None = None  # (R, E) bool
    has_samples: bool = False  # some records have in-context samples: relations are HIDDEN

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if torch.is_tensor(value)}

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with all tensors on a device."""
        moved = {n: t.to(device, non_blocking=True) for n, t in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory, for asynchronous copies to a GPU."""
        pinned = {n: t.pin_memory() for n, t in self.tensors().items()}
        return replace(self, **pinned)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stream:
    """R concatenated records with T tokens in total: a batch before its targets are made."""

    ids: np.ndarray  # (T,) vocabulary ids
    subs: np.ndarray  # (T,)
    segments: np.ndarray  # (T,) segment within its record
    context: np.ndarray  # (T,) bool
    lengths: np.ndarray  # (R,) int64
    num_segments: np.ndarray  # (R,)
    relations: np.ndarray  # (sum of num_segments squared,) uint8

    @classmethod
    def of(cls, records: Sequence[EncodedRecord]) -> Stream:
        return cls(
            ids=_flat([r.ids for r in records], np.int32),
            subs=_flat([r.subs for r in records], np.uint16),
            segments=_flat([r.segments for r in records], np.uint16),
            context=_flat([r.context for r in records], np.bool_),
            lengths=np.array([len(r) for r in records], dtype=np.int64),
            num_segments=np.array([len(r.tree.depths) for r in records], dtype=np.int64),
            relations=_flat([r.tree.relations.ravel() for r in records], np.uint8),
        )

    @classmethod
    def joined(cls, parts: Sequence[Stream]) -> Stream:
        """The records of several streams, in their order; of at least one."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def replace(self, index: int, record: EncodedRecord) -> None:
        """Overwrite record `index` with one that has the same numbers of tokens and segments."""
        begin = int(self.lengths[:index].sum())
        tokens = slice(begin, begin + len(record))
        self.ids[tokens] = record.ids
        self.subs[tokens] = record.subs
        self.segments[tokens] = record.segments
        self.context[tokens] = record.context
        begin = int((self.num_segments[:index].astype(np.int64) ** 2).sum())
        relations = record.tree.relations.ravel()
        self.relations[begin : begin + len(relations)] = relations


class _Targets(NamedTuple):
    positions: np.ndarray  # (N,)
    records: np.ndarray  # (N,)
    ids: np.ndarray  # (N,)
    subs: np.ndarray  # (N,)


def extension_pairs(records: Sequence[EncodedRecord]) -> list[Pair]:
    """The distinct (id, sub > 0) pairs of records, in order of appearance."""
    pairs: dict[Pair, None] = {}
    for record in records:
        at = np.flatnonzero(record.subs)
        own = zip(record.ids[at].tolist(), record.subs[at].tolist(), strict=True)
        pairs.update(dict.fromkeys(own))
    return list(pairs)


def pairs_up_to(ids: np.ndarray, largest_subs: Sequence[int]) -> list[Pair]:
    """The distinct (id, sub > 0) pairs of records with these largest subs, in order of the ids.

    A record with a sub also has all smaller subs of that id (docs/format.md §3), so the largest
    sub of each id determines which pairs occur.
    """
    pairs = zip(ids.tolist(), largest_subs, strict=True)
    return [(i, sub) for i, largest in pairs for sub in range(1, largest + 1)]


def collate(
    records: Sequence[EncodedRecord],
    tokenizer: Tokenizer,
    extension: Sequence[Pair] | None = None,
) -> Batch:
    """Make a batch from records, in the given order.

    Args:
        extension: the (id, sub > 0) pairs of the whole step, if `records` are only the share of a
            rank or micro-batch; None if the records are the whole step.
    """
    if extension is None:
        extension = extension_pairs(records)
    return make_batch(Stream.of(records), tokenizer, extension)


def make_batch(
    stream: Stream,
    tokenizer: Tokenizer,
    extension: Sequence[Pair],
    *,
    as_generated: bool = False,
    own_extension: bool = False,
) -> Batch:
    """Make a batch from a stream.

    Args:
        extension: the (id, sub > 0) pairs of the whole step.
        as_generated: include what generation may write for each record; used in evaluation.
        own_extension: include which pairs are each record's own, so that its losses do not depend
            on the other records.

    Raises:
        KeyError: a target's pair is not in `extension`.
    """
    table = np.array(extension, dtype=np.int64).reshape(-1, 2)  # (E, 2)
    targets = _targets(stream, tokenizer)
    unk, entries = _candidates(stream, tokenizer.unk, table) if as_generated else (None, None)
    return Batch(
        ids=torch.from_numpy(stream.ids.astype(np.int64)),
        subs=torch.from_numpy(stream.subs.astype(np.int64)),
        segments=torch.from_numpy(stream.segments.astype(np.int64)),
        context=torch.from_numpy(stream.context),
        lengths=tuple(stream.lengths.tolist()),
        num_segments=tuple(stream.num_segments.tolist()),
        relations=torch.from_numpy(stream.relations),
        target_positions=torch.from_numpy(targets.positions),
        targets=torch.from_numpy(_numbered(targets, table, len(tokenizer))),
        target_records=torch.from_numpy(targets.records),
        extension_ids=torch.from_numpy(table[:, 0].copy()),
        extension_subs=torch.from_numpy(table[:, 1].copy()),
        unk_is_candidate=unk,
        extension_is_candidate=entries,
        unk=tokenizer.unk,
        extension_is_own=_pairs_of(stream, table, stream.subs > 0) if own_extension else None,
        has_samples=bool((stream.relations == HIDDEN).any()),
    )


def _candidates(stream: Stream, unk: int, table: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each record's context contains `<unk>`, bool [R], and each pair, bool [R, E]."""
    records = np.repeat(np.arange(len(stream.lengths)), stream.lengths)  # (T,)
    unknown = np.zeros(len(stream.lengths), dtype=np.bool_)
    unknown[records[stream.context & (stream.ids == unk)]] = True
    return torch.from_numpy(unknown), _pairs_of(stream, table, stream.context & (stream.subs > 0))


def _pairs_of(stream: Stream, table: np.ndarray, chosen: np.ndarray) -> torch.Tensor:
    """Which pairs of the extension each record has among its chosen tokens, bool [R, E]."""
    entries = np.zeros((len(stream.lengths), len(table)), dtype=np.bool_)
    tokens = np.flatnonzero(chosen)
    if len(tokens):
        records = np.repeat(np.arange(len(stream.lengths)), stream.lengths)  # (T,)
        known = table[:, 0] << 16 | table[:, 1]
        own = stream.ids[tokens].astype(np.int64) << 16 | stream.subs[tokens]
        order = np.argsort(known)
        entries[records[tokens], order[np.searchsorted(known, own, sorter=order)]] = True
    return torch.from_numpy(entries)


def _flat(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if not parts:
        return np.empty(0, dtype=dtype)
    return np.concatenate(parts).astype(dtype, copy=False)


def _targets(stream: Stream, tokenizer: Tokenizer) -> _Targets:
    # Each position of an answer predicts the next token. The last one predicts </s>, whether it is
    # followed by a new segment (which always begins with <s>) or by the end of the record.
    positions = np.flatnonzero(~stream.context)
    ends = np.cumsum(stream.lengths)
    records = np.searchsorted(ends, positions, side="right")
    successor = np.minimum(positions + 1, max(len(stream.ids) - 1, 0))
    ids = stream.ids[successor].astype(np.int64)
    closes = (positions + 1 == ends[records]) | (ids == tokenizer.bos)
    subs = np.where(closes, 0, stream.subs[successor])
    return _Targets(positions, records, np.where(closes, tokenizer.eos, ids), subs)


def _numbered(targets: _Targets, table: np.ndarray, vocab_size: int) -> np.ndarray:
    """The targets' ids; a target with a sub > 0 becomes vocab_size + the index of its pair."""
    result = targets.ids.copy()
    positions = np.flatnonzero(targets.subs)
    if not len(positions):
        return result
    known = table[:, 0] << 16 | table[:, 1]  # a sub has 16 bits
    wanted = result[positions] << 16 | targets.subs[positions]
    order = np.argsort(known)
    found = np.searchsorted(known, wanted, sorter=order)
    if not len(known) or (known[order[np.minimum(found, len(known) - 1)]] != wanted).any():
        raise KeyError("the extension lacks the pair of a target")
    result[positions] = vocab_size + order[found]
    return result
