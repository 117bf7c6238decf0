"""What may not change the model's results: layout, padding, recomputation, other records."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import rounding
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.batch import Batch, collate, extension_pairs
from cpm_bee.encoding import EncodedRecord
from cpm_bee.model import attention
from cpm_bee.model.attention import PaddedGroups
from cpm_bee.model.network import CPMBee, target_loss
from cpm_bee.records import Record

RECORDS: list[Record] = [
    {"input": "春 é" * 4, "question": "风", "<ans>": "é 天"},
    {"<ans>": {"<mask_0>": "ü", "<mask_1>": "漢"}, "input": "ab<mask_0><mask_1>"},
    {"input": tiny.chain("x", 12, "ü 漢" * 6), "<ans>": ""},
    {"input": "b", "<ans>": {"a": {"b": "漢漢", "x": "風"}}},
    {"input": "春" * 40, "<ans>": "春" * 12},
]


def gradients(model: CPMBee, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Summed loss and gradients of the batches."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model.loss(batch)
        loss.backward()
        total = total + loss.detach()
    assert total.isfinite()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return {"loss": total, **found}


def assert_same(model: CPMBee, actual: list[Batch], expected: list[Batch]) -> None:
    """Both give the same loss and gradients, summed."""
    rounding.assert_same(model, lambda m: gradients(m, actual), lambda m: gradients(m, expected))


def part(records: list[EncodedRecord], whole: list[EncodedRecord]) -> Batch:
    return collate(records, tiny.TOKENIZER, extension_pairs(whole))


def test_a_batch_is_the_sum_of_its_records() -> None:
    model, encoded = tiny.make_model(1), tiny.encode(RECORDS)
    whole = [part(encoded, encoded)]
    assert_same(model, [part([e], encoded) for e in encoded], whole)
    assert_same(model, [part(encoded[:2], encoded), part(encoded[2:], encoded)], whole)


def test_the_table_of_the_step_matters() -> None:
    """Or else the test above would show nothing: tables of their own give other losses."""
    model, encoded = tiny.make_model(1), tiny.encode(RECORDS)
    whole = gradients(model, [part(encoded, encoded)])
    alone = gradients(model, [collate([e], tiny.TOKENIZER) for e in encoded])
    assert abs(whole["loss"] - alone["loss"]) > 0.1


@pytest.mark.slow
@examples(15)
@given(st.lists(tiny.records(), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(records: list[Record], rng: random.Random) -> None:
    model, encoded = tiny.make_model(2), tiny.encode(records)
    shuffled = rng.sample(encoded, len(encoded))
    assert_same(model, [part(shuffled, shuffled)], [part(encoded, encoded)])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_padding_has_no_effect(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """All records in one padded group, or only those of equal length together."""
    model, encoded = tiny.make_model(3), tiny.encode(RECORDS)
    batch = part(encoded, encoded)
    usual = attention._GROUP_SHARE
    sizes = [len(PaddedGroups.of(batch, model.position_bias).rows)]
    monkeypatch.setattr(attention, "_GROUP_SHARE", share)
    sizes.append(len(PaddedGroups.of(batch, model.position_bias).rows))
    assert share == 0.5 or sizes[0] != sizes[1]
    assert (sizes[1] == 1) == (share == 0.0)

    def grouped_by(share: float) -> Callable[[CPMBee], dict[str, torch.Tensor]]:
        def run(model: CPMBee) -> dict[str, torch.Tensor]:
            monkeypatch.setattr(attention, "_GROUP_SHARE", share)
            return gradients(model, [batch])

        return run

    rounding.assert_same(model, grouped_by(share), grouped_by(usual))


@pytest.mark.parametrize("at_targets", [False, True])
def test_the_groups_hold_each_query_once(at_targets: bool) -> None:
    batch = part(tiny.encode(RECORDS), tiny.encode(RECORDS))
    groups = PaddedGroups.of(batch, tiny.make_model().position_bias, at_targets=at_targets)
    count = batch.num_targets if at_targets else batch.num_tokens
    assert groups.queries.pad[groups.queries.unpad].tolist() == list(range(count))


@pytest.mark.parametrize("num_attentions", [3, 2, 1, 0])
def test_last_attention_at_targets_alone_is_exact(num_attentions: int) -> None:
    """The logits of `forward` are those of all hidden states, picked afterwards."""
    masks = tuple((layer >= num_attentions, False) for layer in range(3))
    model = tiny.make_model(5, num_layers=3, mask_modules=masks)
    batch = part(tiny.encode(RECORDS), tiny.encode(RECORDS))
    rounding.assert_same(model, lambda m: forward(m, batch), lambda m: from_states(m, batch))


@torch.no_grad()
def forward(model: CPMBee, batch: Batch) -> dict[str, torch.Tensor]:
    return {"logits": model(batch)}


@torch.no_grad()
def from_states(model: CPMBee, batch: Batch) -> dict[str, torch.Tensor]:
    h = tiny.hidden_states(model, batch)[batch.target_positions]
    return {"logits": model.input_embedding.logits(h, batch.extension_ids, batch.extension_subs)}


def test_a_record_does_not_see_another() -> None:
    model, encoded = tiny.make_model(4), tiny.encode(RECORDS)
    other = tiny.encode([{"input": "天天<mask>" * 9, "<ans>": "x"}])

    def beside(others: list[EncodedRecord]) -> Callable[[CPMBee], dict[str, torch.Tensor]]:
        @torch.no_grad()
        def run(model: CPMBee) -> dict[str, torch.Tensor]:
            states = tiny.hidden_states(model, collate(encoded[:1] + others, tiny.TOKENIZER))
            return {"states": states[: len(encoded[0])]}

        return run

    rounding.assert_same(model, beside(other), beside(encoded[1:]))


def test_logits_are_those_of_the_states() -> None:
    model, encoded = tiny.make_model(4), tiny.encode(RECORDS)
    batch = collate(encoded, tiny.TOKENIZER)
    rounding.assert_same(model, lambda m: forward(m, batch), lambda m: from_states(m, batch))


def test_an_answer_is_predicted_from_what_stands_before_it() -> None:
    """Changing an answer's later token leaves the logits of earlier positions alone."""
    model = tiny.make_model(5)
    first, second = (
        collate(tiny.encode([{"<ans>": f"ab{last}", "input": "春"}]), tiny.TOKENIZER)
        for last in ("天", "风")
    )
    # Targets: ab, the last word, </s>. The first two are predicted without seeing the last word.
    rounding.assert_same(
        model,
        lambda m: {"logits": forward(m, first)["logits"][:2]},
        lambda m: {"logits": forward(m, second)["logits"][:2]},
    )
    results = [forward(model, batch)["logits"][2] for batch in (first, second)]
    assert not torch.allclose(*results, atol=1e-2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing_recomputes_the_same(dropout_p: float) -> None:
    model, encoded = tiny.make_model(6, dropout_p=dropout_p), tiny.encode(RECORDS)
    model.train()
    results = []
    calls = []
    model.encoder.layers[1].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        model.encoder.set_checkpointing(checkpointing)
        torch.manual_seed(0)
        results.append(gradients(model, [part(encoded, encoded)]))
    # The same operations on the same values.
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    assert len(calls) == 1 + 2
    with torch.no_grad():
        model(part(encoded, encoded))
    assert len(calls) == 4


def test_dropout_acts_in_training_alone() -> None:
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    model, plain = tiny.make_model(6, dropout_p=0.3), tiny.make_model(6)
    with torch.no_grad():
        assert torch.equal(model(batch), plain(batch))
        model.train()
        assert not torch.allclose(model(batch), model(batch), atol=1e-2)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16_is_near(how: str) -> None:
    model, encoded = tiny.make_model(8), tiny.encode(RECORDS)
    batch = collate(encoded, tiny.TOKENIZER)
    with torch.no_grad():
        exact = model(batch)
        if how == "weights":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            near = model(batch)
            loss = target_loss(near, batch)
    assert near.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (near.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_names() -> None:
    """Exactly the native checkpoint names of docs/format.md §6."""
    attention_names = ["layernorm_before_attention"] + [
        f"self_attention.{part}"
        for part in ("project_q", "project_k", "project_v", "attention_out")
    ]
    ffn_names = ["layernorm_before_ffn", "ffn.w_in.w_0", "ffn.w_in.w_1", "ffn.w_out"]
    expected = {"input_embedding.weight", "position_bias.relative_attention_bias"}
    expected |= {"encoder.output_layernorm.weight"}
    expected |= {f"encoder.layers.0.self_att.{name}.weight" for name in attention_names}
    expected |= {f"encoder.layers.2.ffn.{name}.weight" for name in ffn_names}
    masks = ((False, True), (True, True), (True, False))
    model = CPMBee(tiny.make_config(num_layers=3, mask_modules=masks))
    assert set(model.state_dict()) == expected
    assert {name for name, _ in model.named_parameters()} == expected
