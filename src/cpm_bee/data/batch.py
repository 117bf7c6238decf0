"""The Batch: records of one step as a flat stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from cpm_bee.encoding import EncodedRecord
from cpm_bee.tokenizer import Tokenizer

Pair = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """R records of T tokens in all, laid one after the other, with N targets.

    Records never see each other (SPEC §4), so this has the loss of any packed layout, without
    its padding.
    """

    ids: torch.Tensor  # (T,) int64, vocabulary ids
    subs: torch.Tensor  # (T,) int64, which extension entry of its id; 0 for ordinary tokens
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

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all its tensors on a device."""
        tensors = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if torch.is_tensor(value := getattr(self, f.name))
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


class _Targets(NamedTuple):
    positions: np.ndarray  # (N,)
    ids: np.ndarray  # (N,)
    subs: np.ndarray  # (N,)


def extension_pairs(records: Sequence[EncodedRecord]) -> list[Pair]:
    """The distinct (id, sub > 0) pairs of records, in order of appearance."""
    pairs: dict[Pair, None] = {}
    for record in records:
        places = np.flatnonzero(record.subs)
        pairs.update(
            dict.fromkeys(
                zip(record.ids[places].tolist(), record.subs[places].tolist(), strict=True)
            )
        )
    return list(pairs)


def collate(
    records: Sequence[EncodedRecord],
    tokenizer: Tokenizer,
    extension: Sequence[Pair] | None = None,
) -> Batch:
    """Make a batch of records, in the order given.

    Args:
        extension: the (id, sub > 0) pairs of the whole step, where `records` are only one rank's
            or one micro-step's share of it; None if the records are the whole step.
    """
    if extension is None:
        extension = extension_pairs(records)
    ids = _flat([r.ids for r in records], np.int64)
    subs = _flat([r.subs for r in records], np.int64)
    context = _flat([r.context for r in records], np.bool_)
    lengths = np.array([len(r) for r in records], dtype=np.int64)
    ends = np.cumsum(lengths)
    targets = _targets(ids, subs, context, ends, tokenizer)
    number = {pair: len(tokenizer) + i for i, pair in enumerate(extension)}
    numbered = targets.ids.copy()
    for place in np.flatnonzero(targets.subs):
        numbered[place] = number[int(targets.ids[place]), int(targets.subs[place])]
    table = np.array(extension, dtype=np.int64).reshape(-1, 2)
    return Batch(
        ids=torch.from_numpy(ids),
        subs=torch.from_numpy(subs),
        segments=torch.from_numpy(_flat([r.segments for r in records], np.int64)),
        context=torch.from_numpy(context),
        lengths=tuple(lengths.tolist()),
        num_segments=tuple(len(r.shape.depths) for r in records),
        relations=torch.from_numpy(_flat([r.shape.relations.ravel() for r in records], np.uint8)),
        target_positions=torch.from_numpy(targets.positions),
        targets=torch.from_numpy(numbered),
        target_records=torch.from_numpy(np.searchsorted(ends, targets.positions, side="right")),
        extension_ids=torch.from_numpy(table[:, 0].copy()),
        extension_subs=torch.from_numpy(table[:, 1].copy()),
    )


def _flat(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if not parts:
        return np.empty(0, dtype=dtype)
    return np.concatenate(parts).astype(dtype, copy=False)


def _targets(
    ids: np.ndarray, subs: np.ndarray, context: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer
) -> _Targets:
    # A position of an answer predicts its successor; the successor of an answer's last token is
    # </s>, whether a new segment (always opened by <s>) or the end of the record follows.
    positions = np.flatnonzero(~context)
    successor = np.minimum(positions + 1, max(len(ids) - 1, 0))
    closes = np.isin(positions + 1, ends) | (ids[successor] == tokenizer.bos)
    return _Targets(
        positions,
        np.where(closes, tokenizer.eos, ids[successor]),
        np.where(closes, 0, subs[successor]),
    )
