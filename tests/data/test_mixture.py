"""Several datasets as one: how they are named, what an epoch draws, and their joint index."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import train_support

from cpm_bee.data.batch import make_batch
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.mixture import MixedIndex, MixedPlan, Mixture, Part, open_datasets, parts_of
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.errors import InputError
from cpm_bee.tokenizer import Tokenizer


def test_names_and_weights() -> None:
    assert parts_of("a") == [Part("a", 1)]
    assert parts_of("a=2,b/c=0.5") == [Part("a", 2), Part("b/c", 0.5)]
    assert parts_of("a,b") == [Part("a", 1), Part("b", 1)]
    assert parts_of("a=b=3") == [Part("a=b", 3)]
    for wrong in ("a=", "a=x", "a=0", "a=-1", "a=nan", "a=inf", "=2", "a=1,=2"):
        with pytest.raises(InputError, match="expected FOLDER=WEIGHT, with a weight above 0"):
            parts_of(wrong)
    with pytest.raises(InputError, match="a is named twice"):
        parts_of("a=1,a=2")


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=2,b=1", "c,d", "e=5"):
        Path(name).mkdir()
    assert parts_of("a=2,b=1") == [Part("a=2,b=1", 1)]
    assert parts_of("c,d=3,x") == [Part("c,d", 3), Part("x", 1)]
    assert parts_of("x=2,e=5,c,d") == [Part("x", 2), Part("e=5", 1), Part("c,d", 1)]
    assert parts_of("e=5=2") == [Part("e=5", 2)]


def plan_of(weights: list[float], sizes: list[int], **more: int) -> MixedPlan:
    index: Any = SimpleNamespace(
        starts=np.cumsum([0, *sizes]),
        dataset=SimpleNamespace(parts=[Part(str(i), w) for i, w in enumerate(weights)]),
    )
    lengths = np.arange(sum(sizes)) % 7 + 3
    return MixedPlan(index, lengths, **{"rows": 4, "max_length": 32, "seed": 5, **more})


def test_each_record_comes_as_often_as_its_weight_says() -> None:
    plan = plan_of([2, 0.5, 1.25], [10, 8, 12])
    for epoch in range(3):
        rows = [row for step in plan.steps(epoch, range(4)) for row in step]
        counts = Counter(number for row in rows for number in row)
        assert all(counts[n] == 2 for n in range(10))
        assert sum(counts[n] for n in range(10, 18)) == 4
        assert {counts[n] for n in range(18, 30)} == {1, 2}
        assert sum(counts[n] for n in range(18, 30)) == 15
        lengths = [sum(n % 7 + 3 for n in row) for row in rows]
        assert max(lengths) <= 32
    # Two epochs of half of the records are all of them, four of a quarter too.
    halves = [set(plan.drawn(e).tolist()) & set(range(10, 18)) for e in range(2)]
    assert halves[0] | halves[1] == set(range(10, 18))
    extra = Counter(n for e in range(4) for n in plan.drawn(e).tolist() if n >= 18)
    assert set(extra.values()) == {5}


def test_the_plan_does_not_depend_on_who_plans() -> None:
    plan = plan_of([2, 0.5], [30, 40])
    whole = list(plan.steps(1, range(4)))
    ranks = [list(plan_of([2, 0.5], [30, 40]).steps(1, range(r, 4, 2))) for r in range(2)]
    assert len(whole) > 2
    for number, step in enumerate(whole):
        for rank in range(2):
            own = ranks[rank][number] if number < len(ranks[rank]) else [[], []]
            assert step[rank::2] == own


def test_records_that_are_too_long_are_not_drawn() -> None:
    plan = plan_of([1, 1], [10, 10], max_length=6)
    assert sorted(plan.drawn(0).tolist()) == [n for n in range(20) if n % 7 + 3 <= 6]


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[MixedIndex, list[TokenIndex], Tokenizer]:
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = Tokenizer(train_support.TOKENS)
    folders = [
        train_support.make_dataset(folder, name, train_support.records(count, seed))
        for name, count, seed in (("a", 20, 1), ("b", 30, 2))
    ]
    given = f"{folders[0]}=2,{folders[1]}"
    mixture = open_datasets(given)
    assert isinstance(mixture, Mixture)
    indexes = [TokenIndex.of(dataset, tokenizer) for dataset in mixture.datasets]
    return MixedIndex(mixture, indexes), indexes, tokenizer


def test_the_joint_index(mixed: tuple[MixedIndex, list[TokenIndex], Tokenizer]) -> None:
    index, (first, second), tokenizer = mixed
    assert index.lengths.tolist() == first.lengths.tolist() + second.lengths.tolist()
    assert index.part_of([0, 19, 20, 49]).tolist() == [0, 0, 1, 1]
    assert index.split([45, 3, 20, 0]) == [[3, 0], [45, 20]]
    local, numbers = [3, 7, 21], [23, 27, 41]

    def rng(number: int) -> random.Random:
        return random.Random(number)

    for rng_of, own in ((None, None), (rng, lambda n: rng(n + 20))):
        ours, theirs = index.stream(numbers, rng_of), second.stream(local, own)
        pairs = index.extension_pairs(index.largest_subs(numbers))
        assert pairs == second.extension_pairs(second.largest_subs(local))
        a, b = (make_batch(stream, tokenizer, pairs) for stream in (ours, theirs))
        assert a.ids.tolist() == b.ids.tolist() and a.targets.tolist() == b.targets.tolist()
    both = index.extension_pairs(index.largest_subs([0, 1, 2, 20, 21, 22]))
    parts = [i.extension_pairs(i.largest_subs([0, 1, 2])) for i in (first, second)]
    assert both == sorted({*parts[0], *parts[1]})


def test_the_fingerprint_has_the_weights(
    mixed: tuple[MixedIndex, list[TokenIndex], Tokenizer],
) -> None:
    mixture = mixed[0].dataset
    other = Mixture([part._replace(weight=3) for part in mixture.parts])
    assert other.fingerprint != mixture.fingerprint
    assert Mixture(mixture.parts).fingerprint == mixture.fingerprint
    assert isinstance(open_datasets(mixture.parts[0].folder), BinaryDataset)
    assert isinstance(open_datasets(f"{mixture.parts[0].folder}=2"), Mixture)
