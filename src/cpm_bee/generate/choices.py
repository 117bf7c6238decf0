"""Choosing among the options of a record by the probability of each as the answer.

The probability of an option is that of writing its special token and then `</s>`, among the options
of the record. With `orders` above 1, each record is scored with its options in several orders, and
the probabilities of each option's text are averaged: models prefer some places in the list whatever
stands there (Zheng et al. 2024, "Large Language Models Are Not Robust Multiple Choice Selectors").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cpm_bee.encoding import Encoder
from cpm_bee.generate.scoring import score_records
from cpm_bee.model.network import CPMBee
from cpm_bee.records import ANSWER, Record, Tree, options_of


class Choice(NamedTuple):
    """The options of a record with their probabilities."""

    probabilities: dict[str, float]  # by option token, in the order of the record; the sum is 1

    @property
    def best(self) -> str:
        """The most probable option; the first of equal ones."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


def choose(
    model: CPMBee,
    encoder: Encoder,
    records: Sequence[Record],
    *,
    max_tokens: int,
    orders: int = 1,
    seed: int = 0,
) -> list[Choice | None]:
    """Choose an option for each record; None for a record without options.

    Args:
        max_tokens: the most tokens in a batch.
        orders: the number of orders of the options; the first is the record's own, the others are
            random. At most as many as there are.

    Raises:
        InputError: a special token of a record has a name that the vocabulary lacks.
    """
    variants: list[Record] = []
    of_variant: list[tuple[int, str]] = []  # record and the option that the variant answers with
    for number, record in enumerate(records):
        own = options_of(record)
        if not own:
            continue
        rng = random.Random(f"{seed}/{number}")
        for order in _orders(list(own), orders, rng):
            # Option `shown` of the variant has the text of option `order[shown]` of the record.
            moved = _reordered(record, dict(zip(own, order, strict=True)))
            for shown, original in zip(own, order, strict=True):
                variants.append({**moved, ANSWER: shown})
                of_variant.append((number, original))
    if not variants:
        return [None] * len(records)
    scores = score_records(model, encoder, variants, max_tokens=max_tokens)
    return _averaged(records, of_variant, -scores.losses)


def _orders(options: list[str], count: int, rng: random.Random) -> Iterator[list[str]]:
    seen: set[tuple[str, ...]] = set()
    possible = int(np.prod(np.arange(1, len(options) + 1, dtype=np.float64)).clip(max=1e9))
    order = options
    while len(seen) < min(count, possible):
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield order
        order = rng.sample(options, len(options))


def _reordered(record: Record, source: dict[str, str]) -> Record:
    """Returns a copy of a record in which each option has the text of option `source[option]`."""

    def moved(node: Tree) -> Tree:
        if not isinstance(node, dict):
            return node
        if node.keys() == source.keys():
            return {key: node[source[key]] for key in node}
        return {key: moved(value) for key, value in node.items()}

    return {key: value if key == ANSWER else moved(value) for key, value in record.items()}


def _averaged(
    records: Sequence[Record], of_variant: Sequence[tuple[int, str]], log_p: np.ndarray
) -> list[Choice | None]:
    sums: list[dict[str, float]] = [{} for _ in records]
    i = 0
    while i < len(of_variant):
        number = of_variant[i][0]
        count = len(options_of(records[number]))
        own = np.exp(log_p[i : i + count] - log_p[i : i + count].max())
        for (_, option), p in zip(of_variant[i : i + count], own / own.sum(), strict=True):
            sums[number][option] = sums[number].get(option, 0.0) + float(p)
        i += count
    found: list[Choice | None] = []
    for record, own_sums in zip(records, sums, strict=True):
        total = sum(own_sums.values())
        found.append(
            Choice({option: own_sums[option] / total for option in options_of(record)})
            if own_sums
            else None
        )
    return found
