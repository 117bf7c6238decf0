"""The model against docs/format.md §5 written out pair by pair (dense_reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import dense_reference
import pytest
import rounding
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.model.attention import PositionBias
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee, target_loss
from cpm_bee.records import Record

# Of the largest value of a tensor. The model runs in fp32, the reference in double; 2e-6 is usual,
# but with these weights a softmax is often saturated, and its gradient a small difference.
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 5e-4


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance, f"{what}: {error}"


class Expected(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor]  # of each parameter


def check(model: CPMBee, records: list[Record], samples: Sequence[Record] = ()) -> None:
    """In double precision the same as the reference; in fp32 near to it."""
    weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    logits, pairs, loss = dense_reference.logits_and_loss(
        model.config, weights, records, tiny.TOKENIZER, [samples] * len(records)
    )
    encoder = Encoder(tiny.TOKENIZER, samples)
    encoded = [encoder.encode(record) for record in records]
    assert extension_pairs(encoded) == pairs
    batch = collate(encoded, tiny.TOKENIZER)
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    expected = Expected(logits.detach(), loss.detach(), list(gradients))
    compare(model, batch, expected, TOLERANCE, GRADIENT_TOLERANCE)
    with rounding.double_precision():
        compare(model.double(), batch, expected, rounding.DOUBLE, rounding.DOUBLE)


def compare(
    model: CPMBee, batch: Batch, expected: Expected, tolerance: float, gradient_tolerance: float
) -> None:
    model.zero_grad()
    logits = model(batch)
    assert logits.shape == expected.logits.shape
    largest_logit = expected.logits.abs().max().item()
    assert_near(logits.detach(), expected.logits, "logits", tolerance * largest_logit)
    loss = target_loss(logits, batch) / batch.num_targets
    # The loss is a difference of logits.
    assert_near(loss.detach(), expected.loss, "loss", tolerance * largest_logit)
    loss.backward()
    largest = max(gradient.abs().max().item() for gradient in expected.gradients)
    for (name, parameter), gradient in zip(
        model.named_parameters(), expected.gradients, strict=True
    ):
        assert parameter.grad is not None, name
        scale = max(gradient.abs().max().item(), 0.01 * largest)
        assert_near(parameter.grad, gradient, name, gradient_tolerance * scale)


@pytest.mark.slow
@examples(25)
@given(st.lists(tiny.records(), min_size=1, max_size=3), st.integers(0, 5))
def test_random_records(records: list[Record], seed: int) -> None:
    check(tiny.make_model(seed), records)


HARD: dict[str, list[Record]] = {
    "deeper than the relations distinguish": [
        {"a": tiny.chain("x", 12, "春"), "<ans>": tiny.chain("b", 11, {"x": "ab", "a": "天"})}
    ],
    "many unknown runs": [
        {"input": "é ü 漢 éü", "a": "ü漢<mask_1><mask_7>", "<ans>": "漢 é<mask_7> éü"},
        {"input": "ö é", "<ans>": {"ö": "é ö", "<mask_1>": "ñ<option_4>"}},
    ],
    "nested, empty and shared answers": [
        {"<ans>": {"a": "", "b": {"x": "春天", "ab": {"a": "", "b": "x"}}}, "input": "春风"},
        {"<ans>": ""},
    ],
    "a context after the answer": [{"<ans>": "春春春", "question": "风" * 9}],
    "distances beyond the last bucket": [{"input": "春 风 " * 20, "<ans>": "天 " * 35}],
    "special tokens inside an answer": [
        {"input": "<s>", "<ans>": "a<s>b<s_0>x<s_1></s>x<mask_1><mask_2>"}
    ],
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("pruned", [False, True])
def test_hard_records(case: str, pruned: bool) -> None:
    masks = ((False, True), (True, True), (False, False), (True, False)) if pruned else ()
    check(tiny.make_model(7, num_layers=4, mask_modules=masks), HARD[case])


SAMPLES: dict[str, list[Record]] = {
    "one": [{"input": "天", "<ans>": "春天"}],
    "nested answers, and entries of its own": [
        {"input": "é<mask_1>", "a": {"x": "漢"}, "<ans>": {"a": "ab", "b": {"x": "é 漢"}}},
        {"<ans>": "<option_1>", "<option_1>": "風"},
    ],
    "deeper than the relations distinguish": [{"a": tiny.chain("x", 12, "春"), "<ans>": "a"}],
}


@pytest.mark.parametrize("case", SAMPLES)
def test_in_context_samples(case: str) -> None:
    records: list[Record] = [
        {
            "input": "é",
            "<option_0>": "春",
            "<option_1>": "天",
            "<ans>": {"b": "<option_1>", "a": ""},
        },
        {"<ans>": "春 ab", "question": "風天"},
    ]
    check(tiny.make_model(7), records, SAMPLES[case])


@pytest.mark.slow
@examples(5)
@given(st.lists(tiny.records(), min_size=1, max_size=2), st.lists(tiny.records(), max_size=3))
def test_random_samples(records: list[Record], samples: list[Record]) -> None:
    check(tiny.make_model(2), records, samples)


def test_a_table_with_too_few_segment_buckets() -> None:
    """It serves shallow records; one that would reach past its end is refused."""
    shallow: Record = {"input": "春", "a": {"x": "ab"}, "<ans>": {"a": "é"}}
    check(tiny.make_model(7, position_bias_num_segment_buckets=28), [shallow])
    model = tiny.make_model(7, position_bias_num_segment_buckets=63)
    deep = tiny.encode(HARD["deeper than the relations distinguish"])
    with pytest.raises(InputError, match=r"needs segment bucket 64 .*, this model has 63"):
        model(collate(deep, tiny.TOKENIZER))


@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(256, 2048), (256, 1500), (32, 50), (16, 50), (4, 3)]
)
def test_position_rows(buckets: int, max_distance: int) -> None:
    config: ModelConfig = tiny.make_config(
        position_bias_num_buckets=buckets, position_bias_max_distance=max_distance
    )
    relative = torch.arange(-2500, 2500)
    expected = [dense_reference.position_row(config, r) for r in relative.tolist()]
    assert PositionBias(config).position_rows(relative).tolist() == expected
