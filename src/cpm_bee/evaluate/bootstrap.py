"""Bootstrap intervals of figures over a set of records, and of the difference of two models.

Every figure is a function of sums over records: exact match is (sum of correct) / (number of
records), perplexity exp(sum of losses / sum of targets), BLEU a function of ten sums. So a figure
is stored as one row of statistics per record (`Statistics.rows`) and the function of their sum.
A bootstrap sample draws n of the n records with replacement, which gives each record an integer
weight; the sums of a sample are then one product of the weights with the rows.

Two models are compared on the same samples of the same records (the paired bootstrap; Koehn 2004,
"Statistical Significance Tests for Machine Translation Evaluation"). The interval is that of the
percentiles. Hazard: if all records are right (or all wrong), every sample is, and the interval
would have no width; `_widened` uses the exact binomial bound in this case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SAMPLES = 2000
LEVEL = 0.95
_LARGEST = 1_000_000  # records; more are not worth a suggestion


@dataclass(frozen=True)
class Statistics:
    """A figure of n records.

    Attributes:
        name: what it is, as it appears in the table.
        key: its name in JSON.
        rows: float64 [n, k], what each record adds to the sums; zeros if it does not count.
        value: computes the figure from sums [k]; NaN if it is not defined.
        is_share: whether it is a share of records or tokens, shown in percent.
        higher_is_better: whether a larger value is a better one.
    """

    name: str
    key: str
    rows: np.ndarray
    value: Callable[[np.ndarray], float]
    is_share: bool = True
    higher_is_better: bool = True

    @property
    def figure(self) -> float:
        return self.value(self.rows.sum(axis=0))

    def of(self, chosen: np.ndarray) -> Statistics:
        """The figure of some records only; `chosen` is bool [n]."""
        return replace(self, rows=self.rows[chosen])

    @property
    def counted(self) -> int:
        """The number of records that count."""
        return int(self.rows.any(axis=1).sum())


class Interval(NamedTuple):
    low: float
    high: float


def share(sums: np.ndarray) -> float:
    """The value of statistics (counted successes, trials)."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def weights_of_samples(count: int, seed: int, samples: int = SAMPLES) -> np.ndarray:
    """How often each of `count` records is in each sample, uint16 [samples, count]."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(count, size=count) for _ in range(samples))
    counts = [np.bincount(d, minlength=count).astype(np.uint16) for d in drawn]
    return np.stack(counts)


def interval(statistics: Statistics, weights: np.ndarray) -> Interval:
    """The bootstrap interval of a figure."""
    values = _values(statistics, weights)
    low, high = _percentiles(values)
    return _widened(statistics, low, high) if statistics.is_share else Interval(low, high)


def standard_error(statistics: Statistics, weights: np.ndarray) -> float:
    """The bootstrap estimate of a figure's standard error."""
    values = _values(statistics, weights)
    return float(np.nanstd(values)) if np.isfinite(values).any() else math.nan


class Comparison(NamedTuple):
    """The difference of a figure between two models on the same records."""

    statistics: Statistics  # of the model
    baseline: Statistics
    difference: float
    interval: Interval
    records: int

    @property
    def verdict(self) -> str:
        """What the difference means, as a clause of a sentence."""
        low, high = self.interval
        if not math.isfinite(self.difference):
            return "cannot be compared"
        if low <= 0 <= high:
            return self._within_noise()
        return "better" if (low > 0) == self.statistics.higher_is_better else "worse"

    def _within_noise(self) -> str:
        if not np.any(self.statistics.rows != self.baseline.rows):
            return f"no difference on {self.records:,} records"
        text = f"within noise on {self.records:,} records"
        needed = self.records_that_tell()
        if needed is None:
            return text
        if needed > _LARGEST:
            return f"{text}; more than a million would be needed to tell"
        return f"{text}; about {needed:,} would tell"

    def records_that_tell(self) -> int | None:
        """How many records would show a difference of this size; None if it is zero.

        The width of an interval falls with the square root of the number of records.
        """
        if self.difference == 0:
            return None
        half = (self.interval.high - self.interval.low) / 2
        needed = self.records * (half / self.difference) ** 2
        return _two_digits(max(needed, self.records + 1))


def compare(model: Statistics, baseline: Statistics, weights: np.ndarray) -> Comparison:
    """The difference of a figure between two models, with its paired bootstrap interval."""
    differences = _values(model, weights) - _values(baseline, weights)
    return Comparison(
        model,
        baseline,
        model.figure - baseline.figure,
        _percentiles(differences),
        int((model.rows.any(axis=1) | baseline.rows.any(axis=1)).sum()),
    )


def _values(statistics: Statistics, weights: np.ndarray) -> np.ndarray:
    sums = weights.astype(np.float64) @ statistics.rows  # (samples, k)
    return np.array([statistics.value(row) for row in sums])


def _percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return Interval(math.nan, math.nan)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _widened(statistics: Statistics, low: float, high: float) -> Interval:
    """Widens the interval of a share of 0 or 1 to Clopper and Pearson's."""
    trials = statistics.counted
    if not trials:
        return Interval(low, high)
    bound = ((1 - LEVEL) / 2) ** (1 / trials)
    if statistics.figure == 1:
        return Interval(min(low, bound), 1.0)
    if statistics.figure == 0:
        return Interval(0.0, max(high, 1 - bound))
    return Interval(low, high)


def _two_digits(number: float) -> int:
    """Rounds up to two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
