from __future__ import annotations

import dense_reference
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.batch import Stream, collate, extension_pairs
from cpm_bee.encoding import Encoder
from cpm_bee.records import Record

TENSORS = ("ids", "subs", "segments", "context", "relations", "target_positions", "targets")


@given(st.lists(tiny.records(), max_size=4))
def test_records_are_laid_one_after_the_other(records: list[Record]) -> None:
    encoded = tiny.encode(records)
    batch = collate(encoded, tiny.TOKENIZER)
    assert batch.lengths == tuple(map(len, encoded))
    assert batch.num_tokens == sum(batch.lengths)
    assert batch.num_segments == tuple(len(e.tree.depths) for e in encoded)
    for name in ("ids", "subs", "segments", "context"):
        stream = getattr(batch, name)
        expected = [value for e in encoded for value in getattr(e, name).tolist()]
        assert stream.tolist() == expected
        assert stream.dtype == (torch.bool if name == "context" else torch.int64)
    relations = [v for e in encoded for v in e.tree.relations.ravel().tolist()]
    assert batch.relations.tolist() == relations


@given(st.lists(tiny.records(), max_size=4))
def test_targets(records: list[Record]) -> None:
    size = len(tiny.TOKENIZER)
    encoded = tiny.encode(records)
    batch = collate(encoded, tiny.TOKENIZER)
    pairs = extension_pairs(encoded)
    assert list(zip(batch.extension_ids.tolist(), batch.extension_subs.tolist(), strict=True)) == (
        pairs
    )
    expected = []
    start = 0
    for number, record in enumerate(records):
        tokens = dense_reference.tokens_of(record, tiny.TOKENIZER)
        for position, (token_id, sub) in dense_reference.targets_of(tokens, tiny.TOKENIZER):
            target = size + pairs.index((token_id, sub)) if sub else token_id
            expected.append((start + position, target, number))
        start += len(tokens)
    found = zip(
        batch.target_positions.tolist(),
        batch.targets.tolist(),
        batch.target_records.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert batch.num_targets == len(expected)


@given(st.lists(tiny.records(), max_size=5))
def test_extension_pairs(records: list[Record]) -> None:
    seen = []
    for record in records:
        for token in dense_reference.tokens_of(record, tiny.TOKENIZER):
            if token.sub and (token.id, token.sub) not in seen:
                seen.append((token.id, token.sub))
    assert extension_pairs(tiny.encode(records)) == seen


def test_the_table_of_the_step_numbers_the_targets_of_its_parts() -> None:
    mask, unk = tiny.TOKENIZER.ids["<mask>"], tiny.TOKENIZER.unk
    records: list[Record] = [
        {"input": "é ü<mask_0><mask_1><mask_2>", "<ans>": "ü<mask_2>"},
        {"input": "漢 é ü", "<ans>": "é ü 漢"},
    ]
    first, second = tiny.encode(records)
    pairs = extension_pairs([first, second])
    assert pairs == [(unk, 1), (mask, 1), (mask, 2), (unk, 2)]
    size = len(tiny.TOKENIZER)
    eos, space = tiny.TOKENIZER.eos, tiny.TOKENIZER.ids["</_>"]
    assert collate([first], tiny.TOKENIZER, pairs).targets.tolist() == [size, size + 2, eos]
    part = collate([second], tiny.TOKENIZER, pairs)
    assert part.targets.tolist() == [size, space, size + 3, space, unk, eos]
    assert part.extension_ids.tolist() == [unk, mask, mask, unk]
    # On its own, its table is shorter and its targets have other numbers.
    assert collate([second], tiny.TOKENIZER).targets.tolist() == (
        [size, space, size + 1, space, unk, eos]
    )


def test_a_bos_inside_an_answer_ends_it() -> None:
    """docs/format.md §4 goes by ids alone: also by an `<s>` of the text, and one with a sub."""
    encoded = tiny.encode([{"<ans>": "a<s>b<s_0>x<s_1>x"}])
    assert encoded[0].subs.max() == 1
    ids = [tiny.TOKENIZER.ids[t] for t in ("a", "</s>", "b", "</s>", "x", "</s>", "x", "</s>")]
    assert collate(encoded, tiny.TOKENIZER).targets.tolist() == ids


def test_a_record_without_answer_has_no_targets() -> None:
    encoder = Encoder(tiny.TOKENIZER)
    prompt = encoder.encode({"input": "ab", "<ans>": "a"}, answers=False)
    nothing = encoder.encode({"input": "ab", "<ans>": {}})
    assert collate([prompt, nothing], tiny.TOKENIZER).num_targets == 0


def test_no_records() -> None:
    batch = collate([], tiny.TOKENIZER)
    assert (batch.num_tokens, batch.num_targets, batch.lengths) == (0, 0, ())


def test_to_a_device() -> None:
    batch = collate(tiny.encode([{"input": "é ü", "<ans>": "ü"}]), tiny.TOKENIZER)
    moved = batch.to("meta")
    for name, value in vars(moved).items():
        assert torch.is_tensor(value) == torch.is_tensor(getattr(batch, name))
        if torch.is_tensor(value):
            assert value.device.type == "meta", name
    assert moved.lengths == batch.lengths and moved.num_segments == batch.num_segments


def test_batches_do_not_share_memory_with_their_records() -> None:
    """The records of an index are read-only maps; a batch is its own."""
    encoded = tiny.encode([{"input": "ab", "<ans>": "a"}])
    for array in (encoded[0].ids, encoded[0].subs, encoded[0].segments):
        array.setflags(write=False)
    batch = collate(encoded, tiny.TOKENIZER)
    batch.ids[:] = 0
    batch.segments[:] = 0
    assert encoded[0].ids.any() and encoded[0].segments.any()
    with pytest.raises(ValueError, match="read-only"):
        encoded[0].tree.relations[0, 0] = 1  # cached for all records of this shape
    batch.relations[:] = 9
    assert np.all(encoded[0].tree.relations != 9) or encoded[0].tree.relations[0, 1] == 2


def test_a_target_that_the_table_of_the_step_lacks_is_an_error() -> None:
    encoded = tiny.encode([{"input": "é ü", "<ans>": "ü"}])
    for pairs in ([], [(tiny.TOKENIZER.unk, 2)], [(tiny.TOKENIZER.unk + 1, 1)]):
        with pytest.raises(KeyError, match="lacks the pair"):
            collate(encoded, tiny.TOKENIZER, pairs)


def test_the_tensors_of_a_batch_are_all_its_tensors() -> None:
    batch = collate(tiny.encode([{"input": "é ü", "<ans>": "ü"}]), tiny.TOKENIZER)
    assert batch.tensors().keys() == {n for n, v in vars(batch).items() if torch.is_tensor(v)}
    assert all(value is getattr(batch, name) for name, value in batch.tensors().items())


def test_a_record_of_a_stream_can_be_replaced() -> None:
    records: list[Record] = [
        {"input": "ab", "<ans>": "a"},
        {"input": "é", "<ans>": {"a": "ü", "b": "é漢x"}},
        {"input": {"x": {"a": "b"}}, "<ans>": "ü"},
    ]
    encoded = tiny.encode(records)
    other = tiny.encode([{"input": "é", "<ans>": {"b": "é漢x", "a": "ü"}}])[0]
    assert len(other) == len(encoded[1]) and other.ids.tolist() != encoded[1].ids.tolist()
    stream = Stream.of(encoded)
    stream.replace(1, other)
    expected = Stream.of([encoded[0], other, encoded[2]])
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(stream, name), value, name)
