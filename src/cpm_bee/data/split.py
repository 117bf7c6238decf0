"""Splits records into training and evaluation so that no near-duplicate of one is in the other.

Near-duplicates, and records that were made of one row, form a group (`DuplicateGroups`). Groups are
drawn in random order; one goes to evaluation if it does not overfill it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from cpm_bee.records import ANSWER, Record, Tree

TEMPLATE_SAMPLE = 1000
_COMMON = 0.5  # a text that more of the records have is part of a template


class Template:
    """The texts that most records share, such as the options of a classification.

    They are left out before records are compared: otherwise short texts with the same long options
    would be near-duplicates.

    Args:
        records: at least some of the records; the first 1,000 count.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        counts: Counter[tuple[str, str]] = Counter()
        count = 0
        for record, _ in zip(records, range(TEMPLATE_SAMPLE), strict=False):
            counts.update(set(_texts(record)))
            count += 1
        self._common = {text for text, n in counts.items() if count > 1 and n > _COMMON * count}

    def without(self, record: Record) -> Record:
        """A record with its own texts only, as one to be compared with others."""
        texts = [(path, text) for path, text in _texts(record) if (path, text) not in self._common]
        texts = texts or list(_texts(record))
        return {str(i): text for i, (_, text) in enumerate(texts)}


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    """The texts of a record's context, with their paths."""

    def walk(node: Tree, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, str):
            yield path, node
        else:
            for key, value in node.items():
                yield from walk(value, f"{path}/{key}")

    for key, value in record.items():
        if key != ANSWER:
            yield from walk(value, key)


def choose(groups: list[list[int]], share: float, seed: int) -> np.ndarray:
    """Returns which records are for evaluation, bool [records]: about `share` of them."""
    count = sum(map(len, groups))
    wanted = max(1, round(share * count))
    chosen = np.zeros(count, dtype=bool)
    taken = 0
    for group in random.Random(seed).sample(groups, len(groups)):
        if taken + len(group) <= wanted:
            chosen[group] = True
            taken += len(group)
    return chosen
