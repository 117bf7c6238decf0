"""Confusion table and per-class figures for records with a closed set of answers.

A record is a choice if it has options, a dictionary whose keys are special tokens such as
`<option_0>`, and its answer is one of them. Other records are labels if few distinct answers
account for all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpm_bee.evaluate.bootstrap import Statistics
from cpm_bee.records import ANSWER, Record, options_of

OTHER = "(other)"
_MOST_LABELS = 30
_RECORDS_PER_LABEL = 5


def is_choice(record: Record) -> bool:
    """Whether the answer of a record is one of its options."""
    return isinstance(record[ANSWER], str) and record[ANSWER] in options_of(record)


def are_labels(answers: Sequence[str]) -> bool:
    """Whether answers come from a closed set, by their number alone."""
    distinct = len(set(answers))
    return 2 <= distinct <= min(_MOST_LABELS, len(answers) // _RECORDS_PER_LABEL)


class ClassFigures(NamedTuple):
    """Precision, recall and F1 of one class; NaN becomes 0 as in scikit-learn."""

    name: str
    precision: float
    recall: float
    f1: float
    records: int


class Confusion:
    """Counts of (right class, class that the model gave)."""

    def __init__(self, right: Sequence[str], given: Sequence[str]) -> None:
        self.classes = sorted(set(right))
        known = set(self.classes)
        self.counts = Counter(
            (r, g if g in known else OTHER) for r, g in zip(right, given, strict=True)
        )

    @property
    def columns(self) -> list[str]:
        """The classes that the model gave; with `OTHER` last if it gave any other answer."""
        other = any(given == OTHER for _, given in self.counts)
        return [*self.classes, *([OTHER] if other and OTHER not in self.classes else [])]

    def figures(self) -> list[ClassFigures]:
        """The figures of each class."""
        found = []
        for name in self.classes:
            correct = self.counts[name, name]
            records = sum(n for (right, _), n in self.counts.items() if right == name)
            given = sum(n for (_, g), n in self.counts.items() if g == name)
            precision = correct / given if given else 0.0
            recall = correct / records
            f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
            found.append(ClassFigures(name, precision, recall, f1, records))
        return found


def macro_f1(right: Sequence[str | None], given: Sequence[str | None]) -> Statistics:
    """The mean F1 of the classes.

    Args:
        right: the class of each record; None for records that do not count.
        given: the class that the model gave.
    """
    classes = sorted({name for name in right if name is not None})
    number = {name: i for i, name in enumerate(classes)}
    rows = np.zeros((len(right), len(classes), 3))  # correct, of the class, given this class
    for i, (own, other) in enumerate(zip(right, given, strict=True)):
        if own is None:
            continue
        rows[i, number[own], 0] = own == other
        rows[i, number[own], 1] = 1
        if other in number:
            rows[i, number[other], 2] = 1

    def value(sums: np.ndarray) -> float:
        correct, of_class, given_class = sums.reshape(-1, 3).T
        total = of_class + given_class
        f1 = np.divide(2 * correct, total, out=np.zeros(len(total)), where=total > 0)
        present = of_class > 0
        return float(f1[present].mean()) if present.any() else math.nan

    return Statistics("macro F1", "macro_f1", rows.reshape(len(right), -1), value, is_share=False)
