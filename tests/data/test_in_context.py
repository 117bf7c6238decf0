"""In-context samples in training: what is drawn, planned and encoded, and how it is learned."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import pytest
import tiny
import torch
import train_support
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee import delta
from cpm_bee.data.batch import Batch
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.in_context import InContextPlan, InContextSamples
from cpm_bee.data.mixture import MixedIndex, MixedPlan, Mixture, open_datasets
from cpm_bee.data.packing import Plan
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import Encoder
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.records import Record
from cpm_bee.train.data_loader import DataLoader

LONGEST = 20
lengths = st.lists(st.integers(1, LONGEST + 3), min_size=1, max_size=60).map(np.array)
weights = st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any)


def shares(parts: list[int]) -> list[float]:
    return [part / sum(parts) for part in parts]


def samples_of(lengths: np.ndarray, weights: list[float], **more: Any) -> InContextSamples:
    return InContextSamples(weights, lengths, **{"max_length": LONGEST, "seed": 3, **more})


@given(lengths, weights, st.integers(0, 60), st.integers(0, 3), st.integers(-5, 2**60))
def test_what_an_epoch_draws(
    lengths: np.ndarray, parts: list[int], border: int, epoch: int, seed: int
) -> None:
    border = min(border, len(lengths))
    starts = [0, border, len(lengths)]
    drawing = samples_of(lengths, shares(parts), seed=seed, starts=starts)
    draw = drawing.draw(epoch)
    most, counts = len(parts) - 1, Counter[int]()
    for number, length in enumerate(lengths.tolist()):
        own = draw.samples_of(number)
        counts[len(own)] += 1
        assert len({number, *own}) == 1 + len(own) <= 1 + most, "no record comes twice"
        assert all((n < border) == (number < border) for n in own), "of one dataset"
        assert draw.lengths[number] == length + lengths[own].sum()
        if length > LONGEST:
            assert not own
        else:
            assert draw.lengths[number] <= LONGEST
    assert draw.counts() == [counts[k] for k in range(1, most + 1)]
    again = samples_of(lengths, shares(parts), seed=seed, starts=starts)
    again.draw(epoch + 1)
    assert again.draw(epoch).lengths.tolist() == draw.lengths.tolist()
    assert [again.draw(epoch).samples_of(n) for n in range(len(lengths))] == [
        draw.samples_of(n) for n in range(len(lengths))
    ]


def test_frequencies() -> None:
    """By Hoeffding's inequality, a mean of n independent values in [0, 1] is off by t with a
    probability of at most 2 exp(-2 n t²): 1e-9 for this t."""
    n = 20_000
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * n))
    draw = samples_of(np.ones(n, dtype=int), [0.6, 0.25, 0, 0.15]).draw(0)
    with_one, with_two, with_three = (count / n for count in draw.counts())
    assert with_two == 0 and draw.num_shortened == 0
    assert abs(with_one - 0.25) < bound and abs(with_three - 0.15) < bound
    # Where one is drawn: any other record is equally probable, such as one of the first quarter.
    drawn = [n for number in range(n) for n in draw.samples_of(number)]
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * len(drawn)))
    assert abs(np.mean(np.array(drawn) < n // 4) - 0.25) < bound
    always = samples_of(np.ones(50, dtype=int), [0, 1]).draw(0)
    assert always.counts() == [50]


def test_epochs_and_seeds_differ() -> None:
    drawings = [samples_of(np.ones(50, dtype=int), [0, 1], seed=seed) for seed in (0, 1, -1)]
    draws = [drawing.draw(epoch) for drawing in drawings for epoch in range(3)]
    assert len({tuple(d.samples_of(n)[0] for n in range(50)) for d in draws}) == 9


def test_the_first_that_does_not_fit_and_those_after_it_are_left_out() -> None:
    """Where nothing is too long, the same draw has them all."""
    sizes = np.array([3, 5, 8] * 20)
    whole = samples_of(sizes, [0, 0, 0, 1], max_length=100).draw(0)
    cut = samples_of(sizes, [0, 0, 0, 1], max_length=LONGEST).draw(0)
    shortened = 0
    for number in range(len(sizes)):
        wanted, space = whole.samples_of(number), LONGEST - sizes[number]
        fitting = np.cumsum(sizes[wanted]) <= space
        assert len(wanted) == 3
        assert cut.samples_of(number) == wanted[: int(fitting.sum())]
        shortened += not fitting.all()
    assert cut.num_shortened == shortened > 0 == whole.num_shortened


def test_too_many_segments_leave_samples_out() -> None:
    sizes, segments = np.ones(6, dtype=int), np.array([4000, 50, 50, 50, 50, 50])
    whole = samples_of(sizes, [0, 0, 1]).draw(0)
    cut = samples_of(sizes, [0, 0, 1], num_segments=segments).draw(0)
    for number in range(6):
        wanted = whole.samples_of(number)
        fitting = segments[number] + np.cumsum(segments[wanted]) <= 4096
        assert cut.samples_of(number) == wanted[: int(fitting.sum())]
    assert len(cut.samples_of(0)) == 1


def test_a_dataset_may_be_too_small() -> None:
    assert samples_of(np.ones(1, dtype=int), [0, 1]).draw(0).counts() == [0]
    assert samples_of(np.ones(2, dtype=int), [0, 0, 1]).draw(0).counts() == [2, 0]
    assert samples_of(np.full(2, LONGEST + 1), [0, 1]).draw(0).counts() == [0]


# ------------------------------------------------------------------ plans


@given(lengths, weights, st.integers(1, 5), st.integers(0, 2), st.integers(1, 4))
def test_each_record_is_learned_once_an_epoch(
    lengths: np.ndarray, parts: list[int], rows: int, epoch: int, world_size: int
) -> None:
    def plan() -> InContextPlan:
        drawing = samples_of(lengths, shares(parts))
        return InContextPlan(drawing, rows=rows, max_length=LONGEST, seed=3)

    whole = list(plan().steps(epoch, range(rows)))
    planned = [row for step in whole for row in step]
    assert sorted(n for row in planned for n in row) == np.flatnonzero(lengths <= LONGEST).tolist()
    with_samples = samples_of(lengths, shares(parts)).draw(epoch).lengths
    assert all(with_samples[row].sum() <= LONGEST for row in planned)
    for rank in range(min(world_size, rows)):
        streams = range(rank, rows, world_size)
        own = list(plan().steps(epoch, streams))
        assert own == [[step[s] for s in streams] for step in whole[: len(own)]]


def test_without_samples_it_is_the_plan_of_records() -> None:
    sizes = np.random.default_rng(0).integers(3, LONGEST + 2, 200)
    options: dict[str, Any] = {"rows": 4, "max_length": LONGEST}
    plain = Plan(sizes, shuffle_seed=3, **options)
    drawing = samples_of(sizes, [1, 0])
    ours = InContextPlan(drawing, seed=3, **options)
    for epoch in range(2):
        assert list(ours.steps(epoch, range(4))) == list(plain.steps(epoch, range(4)))


# ------------------------------------------------------------------ what is learned

# Unknown characters and special tokens: most have them alone, some have the same, some none.
RECORDS: list[Record] = [
    {"input": f"a{unknown}<mask_{i}>", "<ans>": {"a": "春天", "b": f"{unknown}x"}}
    for i, unknown in enumerate("éüßéñ")
] + [
    {"<option_0>": "a", "<option_1>": "春", "<ans>": "<option_1>"},
    {"input": "春天 ab", "question": "风", "<ans>": "x"},
    {"input": tiny.chain("x", 9, "ab"), "<ans>": "春 风"},
]
WEIGHTS = (0.2, 0.4, 0.4)


def index_of(folder: Path, records: list[Record], name: str = "set") -> TokenIndex:
    made = train_support.make_dataset(folder, name, records)
    return TokenIndex.of(BinaryDataset(made), tiny.TOKENIZER)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    return index_of(tmp_path_factory.mktemp("in_context"), RECORDS)


def loader_of(index: TokenIndex | MixedIndex, **options: Any) -> DataLoader:
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    values = {"rows": 2, "max_length": 100, "shuffle_seed": 5, "in_context": WEIGHTS, **options}
    return DataLoader(index, tiny.TOKENIZER, engine, **values)


def batches_of(loader: DataLoader, epoch: int = 0) -> list[Batch]:
    return [b for _, batches in loader.batches(epoch) for b in batches if b is not None]


def shuffled(record: Record, samples: list[Record], seed: str) -> list[Record]:
    """A record and its samples, with the items under <ans> in the order of training."""
    rng = random.Random(seed)

    def reordered(tree: Any) -> Any:
        if isinstance(tree, str):
            return tree
        items = list(tree.items())
        rng.shuffle(items)
        return {key: reordered(value) for key, value in items}

    return [
        {key: reordered(value) if key == "<ans>" else value for key, value in each.items()}
        for each in (record, *samples)
    ]


def test_loss_and_gradients_are_those_of_the_dense_reference(index: TokenIndex) -> None:
    """Every step of two epochs, of all weights and of a LoRA on a frozen base."""
    loader, with_samples = loader_of(index), 0
    for epoch in range(2):
        draw = InContextSamples(
            WEIGHTS, index.lengths, max_length=100, seed=5, num_segments=index.num_segments
        ).draw(epoch)
        for step, batches in loader.batches(epoch):
            [share], [batch] = step.shares, batches
            # The batch begins with records that have no samples; no figure depends on the order.
            instances = [
                shuffled(
                    index.source(n),
                    [index.source(s) for s in draw.samples_of(n)],
                    f"5/{epoch}/{n}",
                )
                for n in sorted(share, key=lambda n: bool(draw.samples_of(n)))
            ]
            with_samples += sum(len(own) > 1 for own in instances)
            assert batch is not None
            expected = Encoder(tiny.TOKENIZER)
            ids = [expected.encode(own[0], samples=own[1:]).ids.tolist() for own in instances]
            assert [part.tolist() for part in batch.ids.split(batch.lengths)] == ids
            assert step.tokens == batch.num_tokens == sum(map(len, ids))
            check_learning(instances, batch, step.extension)
    assert with_samples > len(RECORDS)


def check_learning(
    instances: list[list[Record]], batch: Batch, extension: list[tuple[int, int]]
) -> None:
    model = tiny.make_model(3)
    config = delta.DeltaConfig(rank=2)
    tuned = tiny.make_model(3)
    delta.insert(tuned, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    base = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    lora = {
        n: p.detach().double().requires_grad_()
        for n, p in tuned.named_parameters()
        if p.requires_grad
    }
    merged = dict(base)
    for name in [n.removesuffix(".lora.lora_A") for n in lora if n.endswith("lora_A")]:
        path = lora[f"{name}.lora.lora_B"] @ lora[f"{name}.lora.lora_A"]
        weight = base[f"{name}.weight"]
        scale = math.sqrt(weight.shape[1]) * config.alpha / config.rank
        merged[f"{name}.weight"] = weight + scale * path
    for ours, weights, trained in ((model, base, base), (tuned, merged, lora)):
        _, pairs, expected = dense_reference.logits_and_loss(
            ours.config,
            weights,
            [own[0] for own in instances],
            tiny.TOKENIZER,
            [own[1:] for own in instances],
        )
        assert sorted(pairs) == extension
        wanted = torch.autograd.grad(expected, list(trained.values()), materialize_grads=True)
        loss = ours.loss(batch) / batch.num_targets
        found = torch.autograd.grad(
            loss, [dict(ours.named_parameters())[n] for n in trained], materialize_grads=True
        )
        # fp32 against double precision, as in tests/model/test_dense_reference.py.
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
        largest = max(float(g.abs().max()) for g in wanted)
        for name, ours_, theirs in zip(trained, found, wanted, strict=True):
            scale = max(float(theirs.abs().max()), 0.01 * largest)
            assert float((ours_.double() - theirs).abs().max()) <= 5e-4 * scale, name


def test_weight_1_for_alone_is_the_run_without_samples(index: TokenIndex) -> None:
    plain, alone = (batches_of(loader_of(index, in_context=w)) for w in ((), (1.0,)))
    for a, b in zip(plain, alone, strict=True):
        assert {n: t.tolist() for n, t in a.tensors().items()} == {
            n: t.tolist() for n, t in b.tensors().items()
        }
        assert a.lengths == b.lengths and not a.has_samples


def test_a_loader_goes_on_within_an_epoch(index: TokenIndex) -> None:
    whole = list(loader_of(index).batches(1))
    rest = list(loader_of(index).batches(1, done=1))
    assert len(whole) > 2
    for (step, batches), (same_step, same) in zip(whole[1:], rest, strict=True):
        assert step == same_step
        for a, b in zip(batches, same, strict=True):
            assert a is not None and b is not None and torch.equal(a.ids, b.ids)


def test_max_tokens_counts_samples(index: TokenIndex) -> None:
    loader = loader_of(index, max_tokens=95, rows=4)
    found = [b for b in batches_of(loader) if len(b.lengths) > 1]
    assert found and all(batch.num_tokens <= 95 for batch in found)


def test_samples_in_a_mixture(tmp_path: Path) -> None:
    folders = [
        train_support.make_dataset(tmp_path, name, values)
        for name, values in (("a", RECORDS[:5]), ("b", RECORDS[5:]))
    ]
    mixture = open_datasets(f"{folders[0]}=2,{folders[1]}=1")
    assert isinstance(mixture, Mixture)
    index = MixedIndex(mixture, [TokenIndex.of(d, tiny.TOKENIZER) for d in mixture.datasets])
    loader = loader_of(index, in_context=(0.0, 1.0), max_length=300)
    assert isinstance(loader._plan, MixedPlan)
    assert loader.size.in_context == (8,) and loader.size.num_records == 13
    seen: Counter[int] = Counter()
    for step, batches in loader.batches(0):
        seen.update(n for share in step.shares for n in share)
        for part, share, batch in zip(step.share_parts, step.shares, batches, strict=True):
            assert batch is not None and batch.has_samples
            drawn = [loader._samples.draw(0).samples_of(n) for n in share]
            assert all(index.part_of(own).tolist() == [part] for own in drawn)
            assert (
                batch.num_tokens
                == index.lengths[share].sum() + index.lengths[np.concatenate(drawn)].sum()
            )
    assert sorted(seen.values()) == [1] * 3 + [2] * 5
