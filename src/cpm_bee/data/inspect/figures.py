"""The figures of a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from cpm_bee.data.near_duplicates import DuplicateGroups
from cpm_bee.data.packing import Plan
from cpm_bee.data.split import TEMPLATE_SAMPLE, Template
from cpm_bee.encoding import AnswerState, Encoder
from cpm_bee.errors import InputError
from cpm_bee.records import ANSWER, Record, has_answer, options_of
from cpm_bee.segments import outline

MAX_LABELS = 30  # more different answers are no labels
_SHOWN = 5  # places that are kept of each kind


@dataclass
class Places:
    """Records of some kind: their number, and the places of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(where)


@dataclass
class Figures:
    """What a data set is like.

    Attributes:
        name: how it was given.
        max_length: the tokens of a row.
        lengths, num_targets: the tokens of each record, and those predicted; int [records].
        too_long: records that do not fit into a row, and are left out of training.
        unanswered: records without an answer, which are left out too.
        unwritable: records whose answer generation cannot write.
        missing: the records in which each character occurs that the vocabulary lacks.
        with_missing: records with such characters.
        labels: how often each answer occurs; empty if there are more than `MAX_LABELS`.
        positions: for choices, how often each option is the answer.
        rows, fill: the rows of an epoch, and the share of their tokens that is used.
        same: records that are the same as an earlier one, with the same answer.
        contradicting: records whose context is that of an earlier one with another answer.
        near: records in a group of near-duplicates, without the first of each group.
    """

    name: str
    max_length: int
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_targets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    too_long: Places = field(default_factory=Places)
    unanswered: Places = field(default_factory=Places)
    unwritable: Places = field(default_factory=Places)
    missing: Counter[str] = field(default_factory=Counter)
    with_missing: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    positions: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    fill: float = 0.0
    same: Places = field(default_factory=Places)
    contradicting: Places = field(default_factory=Places)
    near: Places = field(default_factory=Places)

    @property
    def records(self) -> int:
        return len(self.lengths)

    def share(self, count: int) -> float:
        return count / self.records if self.records else 0.0


@dataclass
class Overlap:
    """What training and evaluation have in common: records of the evaluation."""

    same: Places = field(default_factory=Places)
    near: Places = field(default_factory=Places)


class Inspector:
    """Collects the figures of one or two data sets, which are compared with each other.

    Args:
        batch_size, max_length, seed: as in training.
    """

    def __init__(self, encoder: Encoder, *, batch_size: int, max_length: int, seed: int) -> None:
        self._encoder = encoder
        self._batch_size, self._max_length, self._seed = batch_size, max_length, seed
        self._groups = DuplicateGroups()
        self._template: Template | None = None
        self._where: list[str] = []  # of all records of all sets
        self._first: dict[int, int] = {}  # of the first set: context -> its answer, hashed
        self._begins: list[int] = []  # the number of each set's first record
        self._overlap = Overlap()

    def inspect(self, name: str, records: Iterable[tuple[str, Record]]) -> Figures:
        """The figures of a set of (place, record), but for its near-duplicates (see `compare`).

        Raises:
            InputError: the vocabulary cannot encode a record.
        """
        figures = Figures(name, self._max_length)
        self._begins.append(len(self._groups))
        records = iter(records)
        head = list(islice(records, TEMPLATE_SAMPLE))
        if self._template is None:
            self._template = Template(record for _, record in head)
        lengths, num_targets, usable = [], [], []
        answers: dict[int, int] = {}  # by context
        for where, record in chain(head, records):
            length, targets, is_usable = self._count(where, record, figures)
            lengths.append(length)
            num_targets.append(targets)
            usable.append(is_usable)
            self._note_answer(record, figures)
            context = hash(json.dumps({k: v for k, v in record.items() if k != ANSWER}))
            answer = hash(json.dumps(record[ANSWER]))
            if context in self._first:
                self._overlap.same.add(where)
            if context not in answers:
                answers[context] = answer
            elif answers[context] == answer:
                figures.same.add(where)
            else:
                figures.contradicting.add(where)
            self._where.append(where)
            self._groups.add(self._template.without(record))
        self._first = self._first or answers
        figures.lengths, figures.num_targets = np.array(lengths), np.array(num_targets)
        if len(figures.labels) > MAX_LABELS:
            figures.labels.clear()
        self._pack(figures, np.array(usable, dtype=bool))
        return figures

    def _count(self, where: str, record: Record, figures: Figures) -> tuple[int, int, bool]:
        """The tokens of a record, those that are predicted, and whether training uses it."""
        segments = outline(record)
        try:
            encoded, extension = self._encoder.encode_outline(segments)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        state = self._encoder.answer_state(segments, extension)
        if not state & AnswerState.KNOWN:
            figures.unanswered.add(where)
        elif not state & AnswerState.WRITABLE:
            figures.unwritable.add(where)
        characters = {c for piece in extension.pieces if piece.is_unknown for c in piece.text}
        figures.missing.update(characters)
        figures.with_missing += bool(characters)
        if len(encoded) > self._max_length:
            figures.too_long.add(where)
        is_usable = bool(state & AnswerState.KNOWN) and len(encoded) <= self._max_length
        return len(encoded), int((~encoded.context).sum()), is_usable

    def _note_answer(self, record: Record, figures: Figures) -> None:
        answer = record[ANSWER]
        if not has_answer(answer):
            return
        options = options_of(record)
        if isinstance(answer, str) and answer in options:
            figures.positions[answer] += 1
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        if len(figures.labels) <= MAX_LABELS:
            figures.labels[options.get(text, text)] += 1

    def _pack(self, figures: Figures, usable: np.ndarray) -> None:
        """Plan an epoch, as training would."""
        lengths = figures.lengths[usable] if len(usable) else figures.lengths
        if not len(lengths):
            return
        plan = Plan(
            lengths, rows=self._batch_size, max_length=self._max_length, shuffle_seed=self._seed
        )
        streams = range(self._batch_size)
        figures.rows = sum(1 for stream in streams for _ in plan.row_stream(0, stream))
        figures.fill = float(lengths.sum()) / (figures.rows * self._max_length)

    def compare(self, sets: list[Figures]) -> Overlap:
        """Fill in the near-duplicates of each set; returns what the second has of the first."""
        second = self._begins[1] if len(self._begins) > 1 else len(self._groups)
        near: list[list[int]] = [[], []]
        common: list[int] = []
        for group in self._groups.groups():
            sides = [n for n in group if n < second], [n for n in group if n >= second]
            for numbers, side in zip(near, sides, strict=True):
                numbers += side[1:]
            common += sides[1] if sides[0] else []
        for figures, numbers in zip(sets, near, strict=False):
            for number in sorted(numbers):
                figures.near.add(self._where[number])
        for number in sorted(common):
            self._overlap.near.add(self._where[number])
        return self._overlap
