from __future__ import annotations

import itertools
import random
from typing import Any

import dense_reference
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee import encoding
from cpm_bee.encoding import AnswerState, EncodedRecord, Encoder, TokenLists
from cpm_bee.errors import InputError
from cpm_bee.generate.prompt import Prompt
from cpm_bee.records import Record, Tree, has_answer
from cpm_bee.segments import is_shuffled, outline


def assert_is(encoded: EncodedRecord, record: Record, *, answers: bool = True) -> None:
    """The encoding is that of docs/format.md §3 written plainly."""
    tokens = dense_reference.tokens_of(record, tiny.TOKENIZER, answers=answers)
    assert encoded.ids.tolist() == [t.id for t in tokens]
    assert encoded.subs.tolist() == [t.sub for t in tokens]
    assert encoded.segments.tolist() == [t.node for t in tokens]
    assert encoded.context.tolist() == [t.is_context for t in tokens]
    paths = [node.path for node in dense_reference.nodes_of(record)]
    assert encoded.tree.relations.tolist() == [
        [dense_reference.bucket(a, b) for b in paths] for a in paths
    ]


@given(tiny.encodable_records())
def test_records_are_encoded_as_specified(record: Record) -> None:
    assert_is(Encoder(tiny.TOKENIZER).encode(record), record)


@given(tiny.encodable_records())
def test_without_answers(record: Record) -> None:
    prompt = Encoder(tiny.TOKENIZER).encode(record, answers=False)
    assert_is(prompt, record, answers=False)
    assert prompt.context.all()


@pytest.mark.slow
@given(st.lists(tiny.records(), max_size=4))
def test_an_encoder_keeps_nothing_of_a_record(records: list[Record]) -> None:
    encoder = Encoder(tiny.TOKENIZER)
    for record in records:
        assert_is(encoder.encode(record), record)


@pytest.mark.slow
@given(st.lists(tiny.records(), max_size=4))
def test_a_cache_that_is_always_full(records: list[Record]) -> None:
    encoder = Encoder(tiny.TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_CACHE_SIZE", 1)
        for record in records:
            assert_is(encoder.encode(record), record)
            assert len(encoder._ordinary) <= 1 and len(encoder._markup) <= 1


def rebuilt(record: Record, rng: random.Random) -> Record:
    """The record in the order in which `outline` goes through it."""
    texts, tree = outline(record, rng)
    segments = list(zip(texts, tree.depths, strict=True))[1:]

    def below(depth: int) -> Any:
        node: dict[str, Any] = {}
        while segments and segments[0][1] == depth:
            key = segments.pop(0)[0]
            is_leaf = segments[0][0].startswith("leaf")
            node[key] = segments.pop(0)[0] if is_leaf else below(depth + 1)
        return node

    return below(1)


ANSWER = {"b": {"d": "leaf 1", "a": "leaf 2", "c": {"x": "leaf 3", "y": "leaf 4"}}, "a": "leaf 5"}
SHUFFLED: Record = {"z": {"b": "leaf 6", "a": "leaf 7"}, "<ans>": ANSWER, "y": "leaf 8"}


def test_only_dictionaries_under_the_answer_are_shuffled() -> None:
    seen = set()
    for seed in range(300):
        record = rebuilt(SHUFFLED, random.Random(seed))
        assert record == SHUFFLED  # the same items, whatever their order
        assert list(record) == list(SHUFFLED)
        assert list(record["z"]) == ["b", "a"]  # type: ignore[arg-type]
        answer: Any = record["<ans>"]
        seen.add((tuple(answer), tuple(answer["b"]), tuple(answer["b"]["c"])))
    orders = [itertools.permutations(keys) for keys in ("ba", "dac", "xy")]
    assert seen == set(itertools.product(*orders))  # 2 * 6 * 2, each equally likely


@given(tiny.records(), st.integers())
def test_a_shuffled_record_is_one_in_another_order(record: Record, seed: int) -> None:
    encoder = Encoder(tiny.TOKENIZER)
    first = encoder.encode(record, rng=random.Random(seed))
    again = encoder.encode(record, rng=random.Random(seed))
    assert first.ids.tolist() == again.ids.tolist() and first.tree == again.tree
    plain = encoder.encode(record)
    assert len(first) == len(plain)
    assert sorted(first.ids.tolist()) == sorted(plain.ids.tolist())
    assert sorted(first.tree.depths) == sorted(plain.tree.depths)
    for pairs in (set(zip(e.ids.tolist(), e.subs.tolist(), strict=True)) for e in (first, plain)):
        # All subs below the largest of an id are there too: the token index relies on it.
        extended = {pair for pair in pairs if pair[1]}
        assert {(i, s - 1) for i, s in extended if s > 1} <= extended
    if not is_shuffled(record):
        assert first.ids.tolist() == plain.ids.tolist()


@given(tiny.records())
def test_is_shuffled(record: Record) -> None:
    def widths(tree: Tree) -> list[int]:
        if isinstance(tree, str):
            return []
        return [len(tree), *itertools.chain(*map(widths, tree.values()))]

    assert is_shuffled(record) == (max([0, *widths(record["<ans>"])]) > 1)


def test_unknown_special_token() -> None:
    with pytest.raises(InputError, match=r"special token <strange_1>: <strange> is not in"):
        Encoder(tiny.TOKENIZER).encode({"input": "a<strange_1>", "<ans>": ""})


def test_too_many_fields_or_unknown_words() -> None:
    most = encoding.MAX_PARTS
    fields: Record = {"<ans>": {"x" * i: "" for i in range(1, 200)}}
    assert len(Encoder(tiny.TOKENIZER).encode(fields).tree.depths) == 2 + 2 * 199
    # With the root, "input", "<ans>" and its text, half as many fields of two segments each.
    words = {f"<mask_{i}>": "" for i in range(encoding.MAX_SEGMENTS // 2 - 2)}
    encoded = Encoder(tiny.TOKENIZER).encode({"input": words, "<ans>": ""})
    assert len(encoded.tree.depths) == encoding.MAX_SEGMENTS
    words["a"] = ""
    with pytest.raises(InputError, match=f"more than {encoding.MAX_SEGMENTS} fields"):
        Encoder(tiny.TOKENIZER).encode({"input": words, "<ans>": ""})
    text = "".join(f"<mask_{i}>" for i in range(most + 1))
    with pytest.raises(InputError, match=f"more than {most} unknown words"):
        Encoder(tiny.TOKENIZER).encode({"input": text, "<ans>": ""})
    text = text.removesuffix(f"<mask_{most}>")
    encoded = Encoder(tiny.TOKENIZER).encode({"input": text, "<ans>": ""})
    assert encoded.subs.max() == most - 1


# ------------------------------------------------------------------ what generation can write


@given(tiny.encodable_records())
def test_the_state_of_an_answer(record: Record) -> None:
    """Against what generation has: its prompt, its candidates, and its way back to a text."""
    encoder = Encoder(tiny.TOKENIZER)
    segments = outline(record)
    state = encoder.answer_state(segments, encoder.append(segments, TokenLists()))
    prompt = Prompt.of(record, encoder)
    generated = encoder.encode_as_generated(record)
    whole = encoder.encode(record)
    context = generated.context
    assert generated.ids[context].tolist() == prompt.encoded.ids.tolist()
    assert generated.subs[context].tolist() == prompt.encoded.subs.tolist()
    leaves = [t for t, p in zip(segments.texts, segments.tree.predicted, strict=True) if p]
    assert bool(state & AnswerState.KNOWN) == any(leaves) == has_answer(record["<ans>"])
    if not state:
        return
    same = generated.subs[context].tolist() == whole.subs[whole.context].tolist()
    assert same or state & AnswerState.RENUMBERED
    pairs = {
        p
        for p in zip(prompt.encoded.ids.tolist(), prompt.encoded.subs.tolist(), strict=True)
        if p[1]
    }
    writable = True
    for number, text in zip(prompt.answers, leaves, strict=True):
        own = generated.segments == number
        tokens = list(
            zip(generated.ids[own].tolist()[1:], generated.subs[own].tolist()[1:], strict=True)
        )
        writable &= all(
            pair in pairs or (not pair[1] and (pair[0] != tiny.TOKENIZER.unk or prompt.has_unknown))
            for pair in tokens
        )
        writable &= writable and prompt.text(tokens) == text
    if "<unk>" not in str(record):
        assert bool(state & AnswerState.WRITABLE) == writable


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input": "a", "<ans>": ""}, 0),
        ({"input": "a", "<ans>": "b"}, 3),
        ({"input": "a", "<ans>": "é"}, 1),
        ({"input": "é", "<ans>": "é"}, 3),
        ({"<ans>": "é", "input": "é"}, 3),
        ({"<ans>": "é", "input": "üé"}, 5),
        ({"<ans>": "<option_1>", "options": {"<option_0>": "a", "<option_1>": "b"}}, 7),
        ({"options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option_1>"}, 3),
        ({"options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option>"}, 1),
        ({"input": "a", "<ans>": "<option>"}, 3),
    ],
)
def test_states_of_answers(record: Record, expected: int) -> None:
    segments = outline(record)
    encoder = Encoder(tiny.TOKENIZER)
    assert encoder.answer_state(segments, encoder.append(segments, TokenLists())) == expected
