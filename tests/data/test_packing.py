from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.packing import PLAN_VERSION, WINDOW, Plan, best_subset, micro_batches, pack

LENGTH = 20
lengths_of_records = st.lists(st.integers(1, LENGTH), max_size=120)
with_too_long = st.lists(st.integers(1, LENGTH + 4), max_size=120).map(
    lambda values: np.array(values, dtype=np.int32)
)

# ------------------------------------------------------------------ the rows of a row stream


@given(st.lists(st.integers(1, 12), max_size=9), st.integers(0, 40))
def test_best_subset(lengths: list[int], space: int) -> None:
    taken = best_subset(lengths, space)
    assert taken == sorted(set(taken))
    best = max(
        total
        for count in range(len(lengths) + 1)
        for chosen in itertools.combinations(lengths, count)
        if (total := sum(chosen)) <= space
    )
    assert sum(lengths[i] for i in taken) == best


def test_of_equal_subsets_early_records_are_taken() -> None:
    assert best_subset([5, 5, 5, 5], 10) == [0, 1]
    assert best_subset([7, 3, 7, 3], 10) == [0, 1]


@given(lengths_of_records)
def test_rows_hold_every_record_once(lengths: list[int]) -> None:
    rows = list(pack(range(100, 100 + len(lengths)), lengths, LENGTH))
    assert sorted(n for row in rows for n in row) == list(range(100, 100 + len(lengths)))
    assert all(row and sum(lengths[n - 100] for n in row) <= LENGTH for row in rows)


@given(st.lists(st.integers(1, LENGTH), min_size=200, max_size=300))
def test_no_record_waits_for_long(lengths: list[int]) -> None:
    rows = list(pack(range(len(lengths)), lengths, LENGTH))
    # The oldest record that is left leads the row, and none came from beyond the window.
    waiting = list(range(len(lengths)))
    for row in rows:
        assert row[0] == waiting[0]
        used_in_order = 0
        while used_in_order < len(row) and row[used_in_order] == waiting[used_in_order]:
            used_in_order += 1
        assert all(waiting.index(n) < used_in_order + WINDOW for n in row)
        waiting = [n for n in waiting if n not in row]


def test_rows_by_hand() -> None:
    # 6 leads; of the rest, 4 fills the row. 7 leads the next one, 3 fills it.
    assert list(pack([5, 6, 7, 8], [6, 7, 3, 4], 10)) == [[5, 8], [6, 7]]
    # What the window cannot fill is taken as it comes.
    assert list(pack(range(50), [1] * 50, 100)) == [list(range(50))]
    assert list(pack(range(100), [1] * 100, 40)) == [
        [*range(40)], [*range(40, 80)], [*range(80, 100)]
    ]  # fmt: skip
    assert list(pack([], [], 10)) == []


def test_rows_are_full() -> None:
    """Lengths like those of CCPM: 23 records a row, none short enough for a usual gap."""
    lengths = np.random.default_rng(0).normal(87, 15, 5000).clip(50, 210).astype(int)
    rows = list(pack(range(5000), lengths.tolist(), 2048))
    assert lengths.sum() / (len(rows) * 2048) > 0.995


# ------------------------------------------------------------------ plans

plans = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 9),
        "shuffle_seed": st.none() | st.integers(-(2**63), 2**64),
    }
)


@given(with_too_long, plans, st.integers(0, 3))
def test_every_record_that_fits_is_in_one_row(
    lengths: np.ndarray, options: dict, epoch: int
) -> None:
    plan = Plan(lengths, max_length=LENGTH, **options)
    steps = list(plan.steps(epoch, range(options["rows"])))
    rows = [row for step in steps for row in step if row]
    used = sorted(n for row in rows for n in row)
    assert used == np.flatnonzero(lengths <= LENGTH).tolist()
    assert plan.num_records == len(used)
    assert all(sum(lengths[n] for n in row) <= LENGTH for row in rows)
    assert all(len(step) == options["rows"] for step in steps)
    # A row stream ends once, and all begin if there are records for all.
    for stream in range(options["rows"]):
        ended = [not step[stream] for step in steps]
        assert ended == sorted(ended)
    if len(used) >= options["rows"]:
        assert all(steps[0])
    again = Plan(lengths, max_length=LENGTH, **options)
    assert steps == list(again.steps(epoch, range(options["rows"])))


@given(with_too_long, plans, st.integers(1, 4))
def test_a_rank_plans_its_own_row_streams_alone(
    lengths: np.ndarray, options: dict, world_size: int
) -> None:
    rows = options["rows"]
    plan = Plan(lengths, max_length=LENGTH, **options)
    whole = list(plan.steps(1, range(rows)))
    for rank in range(min(world_size, rows)):
        streams = range(rank, rows, world_size)
        own = list(plan.steps(1, streams))
        expected = [[step[stream] for stream in streams] for step in whole]
        assert own == expected[: len(own)]
        assert not any(row for step in expected[len(own) :] for row in step)


def numbers(plan: Plan, epoch: int, rows: int) -> list[int]:
    return [n for step in plan.steps(epoch, range(rows)) for row in step for n in row]


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(50, 5)
    orders = [
        numbers(Plan(lengths, rows=4, max_length=LENGTH, shuffle_seed=seed), epoch, 4)
        for seed in (0, 1, -1, 7)
        for epoch in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_records_meet_others_in_every_epoch() -> None:
    """Which stream a record falls to, and who shares its row, is drawn again in every epoch."""
    lengths = np.random.default_rng(0).integers(4, 12, 400)
    plan = Plan(lengths, rows=4, max_length=LENGTH * 2, shuffle_seed=1)
    stream_of = np.zeros((6, 400), dtype=int)
    pairs = set()
    count = 0
    for epoch in range(6):
        for stream in range(4):
            for row in plan.row_stream(epoch, stream):
                stream_of[epoch, row] = stream
                found = set(itertools.combinations(sorted(row), 2))
                count += len(found)
                pairs |= found
    same = (stream_of[1:] == stream_of[:-1]).mean()
    assert 0.2 < same < 0.3
    assert len(pairs) > 0.95 * count


def test_without_a_seed_the_order_is_kept() -> None:
    plan = Plan(np.full(51, 5), rows=3, max_length=LENGTH)
    steps = list(plan.steps(0, range(3)))
    assert steps == list(plan.steps(3, range(3)))
    # Four records a row; record n in stream n % 3.
    assert steps[0] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert steps[-1] == [[48], [49], [50]]


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_all_row_streams_end_at_about_the_same_step(rows: int) -> None:
    """Even where few long records hold most of the tokens, which a plain deal spreads unevenly."""
    lengths = np.random.default_rng(1).lognormal(3, 1.5, 20_000).clip(4, 1024).astype(np.int32)
    plan = Plan(lengths, rows=rows, max_length=1024, shuffle_seed=5)
    streams = [list(plan.row_stream(0, stream)) for stream in range(rows)]
    tokens = [sum(int(lengths[row].sum()) for row in stream) for stream in streams]
    assert max(tokens) - min(tokens) <= 1024
    steps = list(map(len, streams))
    assert max(steps) - min(steps) <= 1
    shuffled = np.random.default_rng(2).permutation(20_000)
    plain = [int(lengths[shuffled[stream::rows]].sum()) for stream in range(rows)]
    assert max(plain) - min(plain) > 3 * 1024  # or the test would show nothing


def test_fewer_records_than_row_streams() -> None:
    steps = list(Plan(np.full(3, 5), rows=8, max_length=LENGTH, shuffle_seed=0).steps(0, range(8)))
    assert len(steps) == 1
    assert sorted(map(len, steps[0])) == [0] * 5 + [1] * 3


def test_lengths_beyond_16_bits() -> None:
    lengths = np.random.default_rng(0).integers(1, 200_000, 300)
    plan = Plan(lengths, rows=4, max_length=150_000, shuffle_seed=0)
    assert sorted(numbers(plan, 0, 4)) == np.flatnonzero(lengths <= 150_000).tolist()


def test_the_plan_stays_what_it_was() -> None:
    """A run resumed with another release, another numpy or another processor goes on with it.

    Where this must change, raise PLAN_VERSION: a run with an earlier state is then refused.
    """
    assert PLAN_VERSION == 2
    lengths = np.arange(40) % 7 + 3
    plan = Plan(lengths, rows=2, max_length=LENGTH, shuffle_seed=11)
    assert next(plan.steps(2, range(2))) == [[11, 27, 36], [19, 7, 20]]


# ------------------------------------------------------------------ parts of a micro-step


@given(lengths_of_records, st.none() | st.integers(1, 60))
def test_micro_batches(lengths: list[int], max_tokens: int | None) -> None:
    parts = micro_batches(range(7, 7 + len(lengths)), lengths, max_tokens)
    assert sorted(n for part in parts for n in part) == list(range(7, 7 + len(lengths)))
    assert all(part and part == sorted(part) for part in parts)
    sums = [sum(lengths[n - 7] for n in part) for part in parts]
    if max_tokens is None:
        assert len(parts) == (1 if lengths else 0)
        return
    assert all(len(part) == 1 or s <= max_tokens for part, s in zip(parts, sums, strict=True))
    # Balanced: what one part has more than another is less than its shortest record.
    for part, s in zip(parts, sums, strict=True):
        assert len(part) == 1 or s - min(sums) <= min(lengths[n - 7] for n in part)


def test_micro_batches_are_few_and_even() -> None:
    assert micro_batches([1, 2, 3, 4], [5, 5, 5, 5], 10) in ([[1, 3], [2, 4]], [[1, 4], [2, 3]])
    assert micro_batches([1, 2, 3], [90, 4, 4], 10) == [[1], [2, 3]]
    assert micro_batches([1, 2, 3], [5, 5, 5], 15) == [[1, 2, 3]]
    assert sorted(map(len, micro_batches(range(100), [7] * 100, 100))) == [12] * 4 + [13] * 4
