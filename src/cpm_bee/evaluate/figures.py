"""The figures of a model on a set of records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cpm_bee.evaluate.bootstrap import Statistics, share
from cpm_bee.evaluate.classes import are_labels, is_choice, macro_f1
from cpm_bee.evaluate.text_metrics import text_statistics
from cpm_bee.generate.scoring import RecordScores
from cpm_bee.records import ANSWER, Record, Tree


@dataclass(frozen=True)
class Outcome:
    """What one model made of n records.

    Attributes:
        scores: of the right answers.
        answers: what the model wrote; None for an answer that it did not reach.
        ended: whether all answers of a record ended before the limit, bool [n].
        choices: the option that the model finds most probable; None without options.
    """

    scores: RecordScores
    answers: list[Tree | None]
    ended: np.ndarray
    choices: list[str | None]


@dataclass(frozen=True)
class Kinds:
    """Which of n records are choices, labels or free text.

    Attributes:
        right: the right class of each record that has one.
    """

    choices: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    right: list[str | None]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Kinds:
        choices = np.array([is_choice(record) for record in records], dtype=bool)
        others = [text_of(r[ANSWER]) for r, c in zip(records, choices, strict=True) if not c]
        labels = ~choices if are_labels(others) else np.zeros(len(records), dtype=bool)
        right = [
            text_of(record[ANSWER]) if closed else None
            for record, closed in zip(records, choices | labels, strict=True)
        ]
        return cls(choices, labels, ~choices & ~labels, right)


@dataclass(frozen=True)
class Figures:
    """Figures in the order of the table, and the signatures of sacrebleu's by key."""

    statistics: list[Statistics]
    signatures: dict[str, str] = field(default_factory=dict)


def text_of(answer: Tree | None) -> str:
    """An answer as one text: the leaves of a nested one in order, a line each."""
    if isinstance(answer, dict):
        return "\n".join(map(text_of, answer.values()))
    return answer or ""


def classes_given(outcome: Outcome, kinds: Kinds) -> list[str | None]:
    """The class that the model gave to each choice or label."""
    return [
        choice if is_choice else text_of(answer) if is_label else None
        for choice, answer, is_choice, is_label in zip(
            outcome.choices, outcome.answers, kinds.choices, kinds.labels, strict=True
        )
    ]


def figures_of(records: Sequence[Record], kinds: Kinds, outcome: Outcome) -> Figures:
    """All figures that have a meaning for these records.

    Raises:
        InputError: there is free text, and a package that its figures need is not installed.
    """
    scores = outcome.scores
    every = np.ones(len(records), dtype=bool)
    found = [_share("exact match", "exact_match", scores.is_exact, every)]
    if kinds.choices.any():
        chosen = np.array(
            [c == r for c, r in zip(outcome.choices, kinds.right, strict=True)], dtype=bool
        )
        found.append(_share("choice accuracy", "acc", chosen, kinds.choices))
    if kinds.choices.any() or kinds.labels.any():
        found.append(macro_f1(kinds.right, classes_given(outcome, kinds)))
    tokens = np.stack([scores.correct, scores.targets], axis=1).astype(np.float64)
    found.append(Statistics("token accuracy", "token_accuracy", tokens, share))
    losses = np.stack([scores.losses, scores.targets], axis=1)
    found.append(
        Statistics(
            "perplexity", "perplexity", losses, _perplexity, is_share=False, higher_is_better=False
        )
    )
    signatures: dict[str, str] = {}
    if kinds.texts.any():
        written = [text_of(answer) for answer in outcome.answers]
        expected = [text_of(record[ANSWER]) for record in records]
        texts, signatures = text_statistics(written, expected, kinds.texts.tolist())
        found += texts
    found.append(_share("answers that ended", "ended", outcome.ended, every))
    return Figures(found, signatures)


def _share(name: str, key: str, succeeded: np.ndarray, counts: np.ndarray) -> Statistics:
    rows = np.stack([succeeded & counts, counts], axis=1).astype(np.float64)
    return Statistics(name, key, rows, share)


def _perplexity(sums: np.ndarray) -> float:
    """The exponential of the mean loss of a token; `</s>` counts."""
    return math.exp(min(sums[0] / sums[1], 700)) if sums[1] else math.nan
