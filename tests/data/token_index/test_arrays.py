from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.token_index.arrays import (
    ADDRESS_ARRAYS,
    ARRAYS,
    Arrays,
    TokenChunk,
    counts_of,
    ends_of,
    from_bytes,
    join,
    split,
    take,
    to_bytes,
)
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.records import Record
from cpm_bee.segments import is_shuffled


def chunk_of(records: list[Record]) -> TokenChunk:
    chunk = TokenChunk(Encoder(tiny.TOKENIZER))
    for record in records:
        chunk.add(record)
    return chunk


def assert_equal(a: Arrays, b: Arrays) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == ARRAYS[name][0]
        np.testing.assert_array_equal(a[name], b[name])


def check(chunk: TokenChunk, records: list[Record]) -> None:
    """The arrays hold what the encoder makes of each single record."""
    arrays = chunk.arrays()
    assert set(arrays) == {*ARRAYS} - {*ADDRESS_ARRAYS}
    assert len(chunk) == len(records)
    ends = ends_of(arrays, [1] * len(records)) if records else np.zeros((0, 3), dtype=int)
    for record, part in zip(records, split(arrays, ends), strict=True):
        encoded = Encoder(tiny.TOKENIZER).encode(record)
        for name in ("ids", "subs", "segments"):
            np.testing.assert_array_equal(part[name], getattr(encoded, name))
        assert part["lengths"] == [len(encoded)]
        assert part["num_targets"] == [np.count_nonzero(~encoded.context)]
        assert chunk.trees[part["trees"][0]] == encoded.tree
        assert part["shuffled"] == [is_shuffled(record)]
        largest: dict[int, int] = {}
        for token_id, sub in zip(encoded.ids.tolist(), encoded.subs.tolist(), strict=True):
            if sub:
                largest[token_id] = max(sub, largest.get(token_id, 0))
        assert part["extension_counts"] == [len(largest)]
        assert part["extension_ids"].tolist() == sorted(largest)
        assert part["extension_subs"].tolist() == [largest[i] for i in sorted(largest)]
    assert chunk.num_tokens == len(arrays["ids"])


@given(st.lists(tiny.records(), max_size=6))
def test_a_chunk_holds_what_the_encoder_makes(records: list[Record]) -> None:
    check(chunk_of(records), records)


def test_what_cannot_be_encoded_is_left_out() -> None:
    good: list[Record] = [{"input": "é 漢", "<ans>": "é"}, {"<ans>": {"a": "<mask_1>", "b": "x"}}]
    bad: Record = {"input": "ü <mask_0>", "question": "<mask_1><strange_0>", "<ans>": "b"}
    chunk = TokenChunk(Encoder(tiny.TOKENIZER))
    chunk.add(good[0])
    with pytest.raises(InputError, match="<strange> is not in"):
        chunk.add(bad)
    chunk.add(good[1])
    check(chunk, good)


@pytest.mark.slow
@given(st.lists(tiny.records(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_another_order(records: list[Record], rng: random.Random) -> None:
    order = list(range(len(records)))
    rng.shuffle(order)
    chunk = chunk_of(records)
    moved = take(chunk.arrays(), np.array(order))
    arrays = chunk_of([records[i] for i in order])
    expected = arrays.arrays()
    trees = [arrays.trees[i] for i in expected.pop("trees")]
    assert [chunk.trees[i] for i in moved.pop("trees")] == trees
    assert_equal(moved, expected)


@pytest.mark.slow
@given(st.lists(tiny.records(), min_size=1, max_size=6), st.data())
def test_parts_and_bytes_and_back(records: list[Record], data: st.DataObject) -> None:
    arrays = chunk_of(records).arrays()
    cut = data.draw(st.integers(0, len(records)))
    sizes = [cut, 0, len(records) - cut]
    ends = ends_of(arrays, sizes)
    parts = list(split(arrays, ends))
    np.testing.assert_array_equal(np.diff(ends, axis=0, prepend=0), [counts_of(p) for p in parts])
    assert_equal(join(parts), arrays)
    for part, size in zip(parts, sizes, strict=True):
        assert_equal(from_bytes(memoryview(b"".join(to_bytes(part))), size), part)
