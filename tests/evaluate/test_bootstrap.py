import math

import numpy as np
import pytest

from cpm_bee.evaluate.bootstrap import (
    Statistics,
    compare,
    interval,
    share,
    standard_error,
    weights_of_samples,
)


def correct(values, **kwargs):
    rows = np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)
    return Statistics("exact match", "exact_match", rows, share, **kwargs)


def test_each_sample_draws_as_many_records_as_there_are():
    weights = weights_of_samples(50, seed=1, samples=20)
    assert weights.shape == (20, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert (weights == weights_of_samples(50, seed=1, samples=20)).all()


def test_interval_of_a_share_is_near_that_of_the_normal_distribution():
    values = np.arange(400) % 4 == 0  # 25 %
    statistics = correct(values)
    weights = weights_of_samples(400, seed=0)
    error = math.sqrt(0.25 * 0.75 / 400)
    low, high = interval(statistics, weights)
    # The bootstrap's own error with 2,000 samples is below a tenth of the width.
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.2 * error)
    assert standard_error(statistics, weights) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("value", [0, 1])
def test_interval_of_a_share_without_any_exception_has_a_width(value):
    low, high = interval(correct([value] * 30), weights_of_samples(30, seed=0))
    bound = 0.025 ** (1 / 30)
    assert (low, high) == pytest.approx((bound, 1) if value else (0, 1 - bound))


def test_records_that_do_not_count_change_nothing():
    some = correct([1, 0, 1, 1])
    more = Statistics("", "", np.vstack([some.rows, np.zeros((5, 2))]), share)
    assert more.figure == some.figure == 0.75
    assert (some.counted, more.counted) == (4, 4)
    assert math.isnan(Statistics("", "", np.zeros((3, 2)), share).figure)


def test_a_clear_difference_is_better_or_worse():
    weights = weights_of_samples(200, seed=0)
    good, bad = correct(np.arange(200) % 10 < 8), correct(np.arange(200) % 10 < 4)
    comparison = compare(good, bad, weights)
    assert comparison.difference == pytest.approx(0.4)
    assert 0.3 < comparison.interval.low < 0.4 < comparison.interval.high < 0.5
    assert comparison.verdict == "better"
    assert compare(bad, good, weights).verdict == "worse"
    lower = [correct(s.rows[:, 0], higher_is_better=False) for s in (good, bad)]
    assert compare(*lower, weights).verdict == "worse"


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.5
    after = before.copy()
    after[:12] = True
    paired = compare(correct(after), correct(before), weights_of_samples(300, 0)).interval
    apart = interval(correct(after), weights_of_samples(300, 0))
    assert paired.high - paired.low < (apart.high - apart.low) / 3


def test_a_small_difference_is_noise_and_the_needed_number_of_records_is_told():
    before = np.arange(40) < 20
    after = before.copy()
    after[[0, 1, 2, 30, 31, 32, 33]] ^= True  # three lost, four gained
    comparison = compare(correct(after), correct(before), weights_of_samples(40, 0))
    needed = comparison.records_that_tell()
    assert comparison.verdict == f"within noise on 40 records; about {needed:,} would tell"
    # Seven changes in 40 records: the difference has a standard deviation of sqrt(7) / 40, so
    # 1.96 of them reach the difference of 1 / 40 at (1.96 * sqrt(7)) ** 2 = 27 times the records.
    assert 700 < needed < 1500


def test_equal_models_are_not_called_noise():
    values = correct(np.arange(10) % 2)
    comparison = compare(values, values, weights_of_samples(10, 0))
    assert comparison.verdict == "no difference on 10 records"
    assert comparison.records_that_tell() is None
