"""What the ranks of a run get of a data set. Here every rank is a thread."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import train_support
from dataset_writer import DatasetWriter
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.errors import InputError
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train import agreement
from cpm_bee.train.agreement import open_index as open_shared_index
from cpm_bee.train.data_loader import DataLoader, PlannedStep
from cpm_bee.train.prefetch import Batches

TOKENIZER = Tokenizer(train_support.TOKENS)
Epoch = list[tuple[PlannedStep, Batches]]
RAGGED = 48  # a --max-length with which four row streams end at different steps


class Exchange:
    """Sums and largest values over ranks that all call in the same order, as engines have."""

    def __init__(self, world_size: int) -> None:
        self._values: dict[int, Sequence[float]] = {}
        self._barrier = threading.Barrier(world_size, timeout=200)
        self.calls = 0

    def __call__(self, rank: int, values: Sequence[float], join: Callable[..., Any]) -> list[Any]:
        self._values[rank] = list(values)
        self._barrier.wait()
        result = [join(column) for column in zip(*self._values.values(), strict=True)]
        self.calls += rank == 0
        self._barrier.wait()
        return result


def engines(world_size: int, *, lockstep: bool = False) -> tuple[list[Any], Exchange]:
    exchange = Exchange(world_size)
    ranks = [
        SimpleNamespace(
            rank=rank,
            world_size=world_size,
            lockstep=lockstep,
            device=torch.device("cpu"),
            reduce=lambda values, rank=rank: exchange(rank, values, sum),
            reduce_max=lambda values, rank=rank: exchange(rank, values, max),
        )
        for rank in range(world_size)
    ]
    return ranks, exchange


def run(
    index: TokenIndex,
    world_size: int = 1,
    *,
    epoch: int = 0,
    done: int = 0,
    lockstep: bool = False,
    **options: Any,
) -> list[Epoch]:
    """An epoch on every rank."""
    options = {"rows": 4, "max_length": 64, **options}

    def epoch_of(engine: Any) -> Epoch:
        return list(DataLoader(index, TOKENIZER, engine, **options).batches(epoch, done))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(epoch_of, engines(world_size, lockstep=lockstep)[0]))


def numbers(step: PlannedStep) -> list[int]:
    return [n for share in step.shares for n in share]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    """The usual records and others with unknown characters, some of them in shuffled answers."""
    unknown: list[Record] = [
        {"input": "".join(f"a{c}" for c in "éüß"[: n % 3 + 1]), "<ans>": {"春": "ü", "夏": "éb"}}
        for n in range(12)
    ]
    values = train_support.records(50, seed=1) + unknown
    return open_index(tmp_path_factory.mktemp("loader"), values)


def open_index(folder: Path, values: list[Record]) -> TokenIndex:
    return TokenIndex.of(
        BinaryDataset(train_support.make_dataset(folder, "set", values)), TOKENIZER
    )


def check_ranks(index: TokenIndex, ranks: list[Epoch]) -> None:
    """Every rank has the same steps, and all of them together what the steps say."""
    assert len({len(epoch) for epoch in ranks}) == 1
    for parts in zip(*ranks, strict=True):
        steps = [dataclasses.replace(step, shares=[]) for step, _ in parts]
        assert all(step == steps[0] for step in steps)
        step = steps[0]
        own = [n for part, _ in parts for n in numbers(part)]
        assert step.records == len(own)
        assert step.tokens == index.lengths[own].sum()
        assert step.targets == index.num_targets[own].sum()
        assert step.extension == sorted(extension_pairs([index.record(n) for n in own]))
        assert step.num_batches == max(len(part.shares) for part, _ in parts)
        for part, batches in parts:
            assert len(batches) == step.num_batches
            assert [b is None for b in batches] == [
                i >= len(part.shares) for i in range(step.num_batches)
            ]
            for share, batch in zip(part.shares, batches, strict=False):
                assert isinstance(batch, Batch)
                assert list(batch.lengths) == index.lengths[share].tolist()


def test_ranks_with_other_data_are_told_before_any_waits(tmp_path: Path) -> None:
    values = train_support.records(8, seed=1)
    folders = [train_support.make_dataset(tmp_path / n, "set", values) for n in "ab"]
    other = train_support.make_dataset(tmp_path / "c", "set", values[::-1])

    def errors(*folders: Path, vocabularies: Sequence[Tokenizer] = (TOKENIZER, TOKENIZER)) -> str:
        def open_on(engine: Any) -> str:
            dataset = BinaryDataset(folders[engine.rank])
            try:
                return str(len(open_shared_index(engine, dataset, vocabularies[engine.rank])))
            except InputError as error:
                return str(error).partition(": ")[2].partition(";")[0]

        with ThreadPoolExecutor(2) as pool:
            return ", ".join(pool.map(open_on, engines(2)[0]))

    message = "the processes have different data or vocabularies"
    assert errors(*folders) == "8, 8"
    assert errors(folders[0], other) == f"{message}, {message}"
    longer = Tokenizer([*train_support.TOKENS, "more"])
    assert errors(*folders, vocabularies=(longer, TOKENIZER)) == f"{message}, {message}"


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_ranks_does_the_same_steps(
    index: TokenIndex, accumulate: int, max_tokens: int | None
) -> None:
    options = {"shuffle_seed": 3, "accumulate": accumulate, "max_tokens": max_tokens, "rows": 8}
    expected = None
    for world_size in (1, 2, 4):
        ranks = run(index, world_size, **options)
        check_ranks(index, ranks)
        together = [
            sorted(n for s, _ in parts for n in numbers(s)) for parts in zip(*ranks, strict=True)
        ]
        assert sorted(n for step in together for n in step) == list(range(len(index)))
        assert together == (expected := expected or together)


def test_a_rank_without_a_row_gets_none(index: TokenIndex) -> None:
    ranks = run(index, 4, max_length=RAGGED, shuffle_seed=0)
    check_ranks(index, ranks)
    last = [epoch[-1] for epoch in ranks]
    idle = [batches for step, batches in last if not step.shares]
    assert idle and len(idle) < 4
    assert all(batches == [None] for batches in idle)


def test_in_lockstep_a_rank_has_a_batch_for_each_of_the_others(index: TokenIndex) -> None:
    plain = run(index, 4, max_length=RAGGED, max_tokens=40)
    lockstep = run(index, 4, max_length=RAGGED, max_tokens=40, lockstep=True)
    fillers = 0
    for before, after in zip(plain, lockstep, strict=True):
        for (step, batches), (same_step, filled) in zip(before, after, strict=True):
            assert same_step == step and len(filled) == step.num_batches
            own = len(step.shares)
            assert_same_batches(batches[:own], filled[:own])
            for batch in filled[own:]:
                assert batch is not None
                assert batch.lengths == (index.lengths.min(),) and batch.num_targets
                classes = len(TOKENIZER) + len(batch.extension_ids)
                assert int(batch.targets.max()) < classes
                fillers += 1
    assert fillers


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_exchange_of_each_kind_a_step(index: TokenIndex, world_size: int) -> None:
    ranks, exchange = engines(world_size)
    options = {"rows": 4, "max_length": 64, "shuffle_seed": 1}
    loaders = [DataLoader(index, TOKENIZER, engine, **options) for engine in ranks]
    with ThreadPoolExecutor(world_size) as pool:
        steps = list(pool.map(lambda loader: sum(1 for _ in loader.batches(0)), loaders))
    assert exchange.calls == 2 * (steps[0] + 1)  # the last one says that the epoch is over


@pytest.mark.parametrize("done", [0, 1, 3, 1000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_after_some_steps(
    index: TokenIndex, world_size: int, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(index, world_size, shuffle_seed=3, epoch=1)
    made = []
    original = DataLoader._make
    monkeypatch.setattr(
        DataLoader, "_make", lambda loader, step: made.append(step) or original(loader, step)
    )
    rest = run(index, world_size, shuffle_seed=3, epoch=1, done=done)
    for all_steps, some in zip(whole, rest, strict=True):
        assert [step for step, _ in some] == [step for step, _ in all_steps[done:]]
        for (_, first), (_, second) in zip(all_steps[done:], some, strict=True):
            assert_same_batches(first, second)
    assert len(made) == sum(map(len, rest))  # steps that are done are not made again


def assert_same_batches(first: Batches, second: Batches) -> None:
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        for name in vars(a) if a is not None else ():
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_drop_last_leaves_out_steps_with_fewer_rows(index: TokenIndex) -> None:
    for max_length in (64, RAGGED):
        options = {"shuffle_seed": 0, "max_length": max_length}
        (whole,), (full,) = run(index, **options), run(index, drop_last=True, **options)
        kept = [step for step, _ in whole if step.rows == 4]
        assert [step for step, _ in full] == kept
        assert (len(kept) < len(whole)) == (max_length == RAGGED)


def test_drop_last_that_leaves_nothing_is_refused(index: TokenIndex) -> None:
    (engine,), _ = engines(1)
    count = len(index)
    assert run(index, rows=count, drop_last=True, shuffle_seed=0)[0]
    with pytest.raises(
        InputError, match=f"--drop-last leaves nothing.*one step of {count + 1} rows"
    ):
        DataLoader(index, TOKENIZER, engine, rows=count + 1, max_length=64, drop_last=True)


def test_answers_are_shuffled_in_training_alone(index: TokenIndex) -> None:
    def answers(**options: Any) -> dict[int, tuple[int, ...]]:
        (epoch,) = run(index, **options)
        found = {}
        for step, batches in epoch:
            for share, batch in zip(step.shares, batches, strict=True):
                assert batch is not None
                ids = batch.ids.split(list(batch.lengths))
                found |= {n: tuple(i.tolist()) for n, i in zip(share, ids, strict=True)}
        return found

    plain = {n: tuple(index.record(n).ids.tolist()) for n in range(len(index))}
    assert answers() == plain
    first, second = (answers(shuffle_seed=1, epoch=epoch) for epoch in (0, 1))
    assert first == answers(shuffle_seed=1, rows=7)  # whatever the steps
    for other in (first, second):
        changed = {n for n in plain if other[n] != plain[n]}
        assert changed and changed < set(np.flatnonzero(index._arrays["shuffled"]).tolist())
        assert all(sorted(other[n]) == sorted(plain[n]) for n in plain)
    assert first != second


@pytest.mark.slow
@given(st.integers(1, 200), st.integers(1, 3))
def test_max_tokens(index: TokenIndex, max_tokens: int, accumulate: int) -> None:
    options = {"shuffle_seed": 3, "rows": 6, "accumulate": accumulate}
    (whole,), (split,) = run(index, **options), run(index, max_tokens=max_tokens, **options)
    for (first, _), (second, batches) in zip(whole, split, strict=True):
        assert sorted(numbers(first)) == sorted(numbers(second))
        assert all(b.num_tokens <= max_tokens or len(b.lengths) == 1 for b in batches if b)
        # A micro-step is split, never mixed with another.
        owners = {n: i for i, share in enumerate(first.shares) for n in share}
        assert all(len({owners[n] for n in share}) == 1 for share in second.shares)


def test_batches_are_those_of_single_records(index: TokenIndex) -> None:
    (epoch,) = run(index)
    for step, batches in epoch:
        expected: Batches = [
            collate([index.record(n) for n in share], TOKENIZER, step.extension)
            for share in step.shares
        ]
        assert_same_batches(batches, expected)


def test_the_least_number_of_steps(index: TokenIndex, tmp_path: Path) -> None:
    (engine,), _ = engines(1)
    loader = DataLoader(index, TOKENIZER, engine, rows=2, max_length=64, shuffle_seed=0)
    count = sum(1 for _ in loader.batches(0))
    assert count - 2 <= loader.size.min_steps <= count
    one = open_index(tmp_path, train_support.records(1, seed=0))
    assert DataLoader(one, TOKENIZER, engine, rows=9, max_length=64).size.min_steps == 1


def test_records_that_are_too_long_are_counted(index: TokenIndex, tmp_path: Path) -> None:
    (engine,), _ = engines(1)
    limit = int(np.median(index.lengths))
    loader = DataLoader(index, TOKENIZER, engine, rows=2, max_length=limit, shuffle_seed=0)
    assert loader.num_records == np.count_nonzero(index.lengths <= limit)
    assert loader.num_records + loader.size.num_too_long == len(index)
    assert sum(step.records for step, _ in loader.batches(0)) == loader.num_records
    with pytest.raises(InputError, match="none of its 62 records fits into --max-length 3"):
        DataLoader(index, TOKENIZER, engine, rows=2, max_length=3)
    with DatasetWriter(tmp_path / "empty", "data"):
        pass
    empty = TokenIndex.of(BinaryDataset(tmp_path / "empty"), TOKENIZER)
    with pytest.raises(InputError, match="none of its 0 records"):
        DataLoader(empty, TOKENIZER, engine, rows=2, max_length=64)


@pytest.mark.parametrize("steps", [(40, 40), (40, 20)])
def test_processes_that_resume_from_different_states_are_refused(steps: tuple[int, int]) -> None:
    """Each opens the state on its own, and one may have found its copy of the latest damaged."""

    def message(engine: Any, step: int) -> str:
        try:
            agreement.check_same_step(engine, step)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = set(pool.map(message, engines(2)[0], steps))
    if steps[0] == steps[1]:
        assert told == {""}
    else:
        (text,) = told
        assert "finds the state of step 20, another one the state of step 40" in text
