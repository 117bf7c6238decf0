from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.planning import Plan, Row, Step, best_fit

LENGTH = 20
lengths_of_records = st.lists(st.integers(1, LENGTH), max_size=60)
with_too_long = st.lists(st.integers(1, LENGTH + 4), max_size=60).map(np.array)


def naive(lengths: list[int], batch_size: int, max_length: int) -> list[list[Row]]:
    """SPEC §4 word for word."""
    open_rows: list[Row] = []  # oldest first
    emitted = []
    for number, length in enumerate(lengths):
        best = None
        for row in open_rows:
            space = max_length - sum(lengths[n] for n in row)
            if space >= length and (best is None or space < best[0]):
                best = (space, row)
        if best is None:
            open_rows.append([number])
        else:
            best[1].append(number)
        if len(open_rows) == batch_size + 1:
            emitted.append(open_rows[:batch_size])
            open_rows = open_rows[batch_size:]
    return emitted + ([open_rows] if open_rows else [])


@given(lengths_of_records, st.integers(1, 6))
def test_best_fit(lengths: list[int], batch_size: int) -> None:
    found = list(best_fit(range(len(lengths)), lengths, batch_size, LENGTH))
    assert found == naive(lengths, batch_size, LENGTH)


def test_best_fit_by_hand() -> None:
    # The least space that holds it, exact fits count: 3 goes to the row of 7, 4 to that of 6.
    assert list(best_fit([5, 6, 7, 8], [6, 7, 3, 4], 9, 10)) == [[[5, 8], [6, 7]]]
    # Of equals the oldest.
    assert list(best_fit([0, 1, 2], [8, 8, 2], 9, 10)) == [[[0, 2], [1]]]
    # The third row emits the first two; the record of 1 finds only the third open.
    assert list(best_fit([0, 1, 2, 3], [9, 9, 9, 1], 2, 10)) == [[[0], [1]], [[2, 3]]]
    assert list(best_fit([], [], 2, 10)) == []


plans = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "drop_last": st.booleans(),
        "shuffle_seed": st.none() | st.integers(-(2**63), 2**64),
    }
)


@given(with_too_long, plans, st.integers(0, 3))
def test_every_record_that_fits_is_in_one_row(
    lengths: np.ndarray, options: dict, epoch: int
) -> None:
    plan = Plan(lengths, max_length=LENGTH, **options)
    steps = list(plan.epoch(epoch))
    rows = [row for step in steps for row in step.rows]
    used = [n for step in steps for n in step.numbers]
    assert used == [n for row in rows for n in row]
    assert len(set(used)) == len(used)
    assert all(lengths[n] <= LENGTH for n in used)
    assert all(row and sum(lengths[n] for n in row) <= LENGTH for row in rows)
    assert all(len(step.rows) == options["rows"] for step in steps[:-1])
    usable = np.flatnonzero(lengths <= LENGTH).tolist()
    if not options["drop_last"]:
        assert sorted(used) == usable
    whole = list(Plan(lengths, max_length=LENGTH, **{**options, "drop_last": False}).epoch(epoch))
    kept = [s for s in whole if len(s.rows) == options["rows"]] if options["drop_last"] else whole
    assert steps == kept
    assert steps == list(plan.epoch(epoch))
    assert steps == list(Plan(lengths, max_length=LENGTH, **options).epoch(epoch))


def numbers(plan: Plan, epoch: int) -> list[int]:
    return [n for step in plan.epoch(epoch) for n in step.numbers]


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(50, 5)
    orders = [
        numbers(Plan(lengths, rows=4, max_length=LENGTH, shuffle_seed=seed), epoch)
        for seed in (0, 1, -1, 7)
        for epoch in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_without_a_seed_the_order_is_kept() -> None:
    lengths = np.full(50, 5)
    plan = Plan(lengths, rows=4, max_length=LENGTH)
    assert numbers(plan, 0) == numbers(plan, 3) == list(range(50))


def test_rows_over_all_ranks_decide_not_their_number() -> None:
    """The same global rows make the same steps, whether for one rank of 8 rows or 4 of 2."""
    lengths = np.arange(1, 41) % LENGTH + 1
    plan = Plan(lengths, rows=8, max_length=LENGTH, shuffle_seed=3)
    for step in plan.epoch(0):
        for world_size, accumulate in ((1, 1), (4, 1), (2, 2), (4, 2)):
            spread = [
                n
                for rank in range(world_size)
                for part in step.micro_steps(rank, world_size, accumulate)
                for n in part
            ]
            assert sorted(spread) == sorted(step.numbers)


@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 4))
def test_micro_steps_partition_a_step(num_rows: int, world_size: int, accumulate: int) -> None:
    step = Step([[2 * i, 2 * i + 1] for i in range(num_rows)])
    parts = [step.micro_steps(rank, world_size, accumulate) for rank in range(world_size)]
    assert all(len(part) == accumulate for part in parts)
    spread = [n for part in parts for micro in part for n in micro]
    assert sorted(spread) == step.numbers
    # Rows stay whole, and no share is larger than another by more than a row.
    shares = [micro for part in parts for micro in part]
    for share in shares:
        assert share[1::2] == [n + 1 for n in share[::2]]
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_last_step_that_happens_to_be_full_stays(drop_last: bool) -> None:
    plan = Plan(np.full(6, LENGTH), rows=3, max_length=LENGTH, drop_last=drop_last)
    assert [len(step.rows) for step in plan.epoch(0)] == [3, 3]
