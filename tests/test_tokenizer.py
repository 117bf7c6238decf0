from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pieces import split_pieces

from cpm_bee.errors import InputError
from cpm_bee.tokenizer import (
    REQUIRED,
    ExtensionTable,
    MarkupError,
    Piece,
    Tokenizer,
    escape,
    split_markup,
)

# Texts in which the interesting characters are frequent, and any others.
plain_texts = st.text(
    st.sampled_from("ab cd<>\n春天x_0/é") | st.characters(exclude_categories=["Cs"])
)
special_tokens = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"])).map(
    lambda name: f"<{name}>"
)
markup_texts = st.lists(plain_texts.map(escape) | special_tokens).map("".join)


def golden_lines(golden: Path) -> list[dict]:
    path = golden / "tokenizer.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_golden_texts(golden: Path, vocabulary: Tokenizer) -> None:
    good = [case for case in golden_lines(golden) if "error" not in case]
    assert good
    for case in good:
        extension = ExtensionTable(len(vocabulary))
        assert vocabulary.encode(case["text"], extension) == case["ids"], case["text"]
        pieces = split_pieces(vocabulary, case["text"])
        assert [list(piece) for piece in pieces] == case["pieces"], case["text"]
        table = {str(len(vocabulary) + i): p.text for i, p in enumerate(extension.pieces)}
        assert table == case["ext"], case["text"]
        assert vocabulary.decode(case["ids"], extension) == case["decoded"], case["text"]


def test_golden_errors(golden: Path, vocabulary: Tokenizer) -> None:
    bad = [case for case in golden_lines(golden) if "error" in case]
    assert bad
    for case in bad:
        with pytest.raises(MarkupError) as caught:
            vocabulary.encode(case["text"])
        position = re.search(r"at pos (\d+)", case["error"])
        if position:
            assert f"'<' at position {position[1]} " in str(caught.value)
        else:
            assert "is not closed" in str(caught.value)


def test_vocabulary_file(vocabulary: Tokenizer) -> None:
    assert len(vocabulary) == 86583
    first = "<pad> <unk> <mask> <sep> </n> </_> <s> </s> <root> <ans> <option>"
    assert vocabulary.tokens[:11] == first.split()
    assert (vocabulary.pad, vocabulary.unk, vocabulary.bos, vocabulary.eos) == (0, 1, 6, 7)


@given(plain_texts)
def test_an_escaped_text_is_one_plain_part(text: str) -> None:
    assert list(split_markup(escape(text))) == ([(text, False)] if text else [])


@given(st.lists(plain_texts | special_tokens.map(lambda s: (s,))))
def test_split_markup_gives_back_the_parts(parts: list) -> None:
    text = "".join(p[0] if isinstance(p, tuple) else escape(p) for p in parts)
    merged: list[tuple[str, bool]] = []
    for part in parts:
        if isinstance(part, tuple):
            merged.append((part[0], True))
        elif merged and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + part, False)
        elif part:
            merged.append((part, False))
    assert list(split_markup(text)) == merged


@given(st.text(st.sampled_from("<>a")))
@example("<<<")
def test_any_text_is_split_or_refused_with_a_true_position(text: str) -> None:
    try:
        parts = list(split_markup(text))
    except MarkupError as error:
        positions = [int(number) for number in re.findall(r"at position (\d+)", str(error))]
        assert positions
        assert all(text[position] == "<" for position in positions)
    else:
        assert "".join(p if special else escape(p) for p, special in parts) == text


@given(markup_texts)
def test_round_trip_small(small_vocabulary: Tokenizer, text: str) -> None:
    extension = ExtensionTable(len(small_vocabulary))
    ids = small_vocabulary.encode(text, extension)
    assert small_vocabulary.decode(ids, extension) == text


@given(markup_texts)
def test_round_trip_real(vocabulary: Tokenizer, text: str) -> None:
    extension = ExtensionTable(len(vocabulary))
    assert vocabulary.decode(vocabulary.encode(text, extension), extension) == text


@given(markup_texts)
def test_ids_and_pieces_agree(small_vocabulary: Tokenizer, text: str) -> None:
    extension = ExtensionTable(len(small_vocabulary))
    ids = small_vocabulary.encode(text, extension)
    pieces = split_pieces(small_vocabulary, text)
    assert len(ids) == len(pieces)
    for token_id, piece in zip(ids, pieces, strict=True):
        assert (token_id >= len(small_vocabulary)) == (
            piece.is_unknown or (piece.is_special and piece.text not in small_vocabulary.specials)
        )
    extended = [i for i in ids if i >= len(small_vocabulary)]
    first_seen = list(dict.fromkeys(extended))
    assert first_seen == list(range(len(small_vocabulary), len(small_vocabulary) + len(extension)))


@given(st.text(st.sampled_from("abcd <x>é春天\n")))
def test_matching_is_greedy_from_the_left(small_vocabulary: Tokenizer, text: str) -> None:
    special = {*small_vocabulary.specials, "</n>", "</_>"}
    entries = {token for token in small_vocabulary.tokens if token not in special} | {" ", "\n"}
    expected: list[Piece] = []
    position = 0
    while position < len(text):
        ends = [e for e in range(len(text), position, -1) if text[position:e] in entries]
        if ends:
            expected.append(Piece(text[position : ends[0]], False, False))
            position = ends[0]
        else:
            run = expected.pop().text if expected and expected[-1].is_unknown else ""
            expected.append(Piece(run + text[position], True, False))
            position += 1
    assert split_pieces(small_vocabulary, escape(text)) == expected


def test_extension_ids_are_shared_by_the_texts_of_a_record(small_vocabulary: Tokenizer) -> None:
    extension = ExtensionTable(len(small_vocabulary))
    size = len(small_vocabulary)
    assert small_vocabulary.encode("<mask_1>é", extension) == [size, size + 1]
    assert small_vocabulary.encode("é<mask_0><mask_1>", extension) == [size + 1, size + 2, size]
    assert len(extension) == 3


def test_an_unknown_run_is_not_the_special_token_of_the_same_text(
    small_vocabulary: Tokenizer,
) -> None:
    extension = ExtensionTable(len(small_vocabulary))
    unknown = extension.id_of(Piece("<é>", True, False))
    special = extension.id_of(Piece("<é>", False, True))
    assert unknown != special
    assert small_vocabulary.decode([unknown, special], extension) == "<<é><é>"


def test_ids_beyond_the_vocabulary_need_the_extension(small_vocabulary: Tokenizer) -> None:
    with pytest.raises(ValueError, match="extension table"):
        small_vocabulary.decode([len(small_vocabulary)])


def test_category(small_vocabulary: Tokenizer) -> None:
    tokenizer = small_vocabulary
    assert tokenizer.category(Piece("é", True, False)) == tokenizer.unk
    assert tokenizer.category(Piece("<mask_0>", False, True)) == tokenizer.ids["<mask>"]
    assert tokenizer.category(Piece("<option_1_2>", False, True)) == tokenizer.ids["<option>"]
    for name in ("<strange_0>", "</n>", "</_>", "<>"):
        with pytest.raises(MarkupError, match=re.escape(name)):
            tokenizer.category(Piece(name, False, True))


def test_load_reports_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    with pytest.raises(InputError, match=r"vocab\.txt: no such vocabulary file"):
        Tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"vocab\.txt: not UTF-8"):
        Tokenizer.load(path)
    path.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(InputError, match="lacks <pad> <unk>"):
        Tokenizer.load(path)
    path.write_text("\n".join([*REQUIRED, "a", "b", "a"]), encoding="utf-8")
    with pytest.raises(InputError, match=r"1 tokens appear twice, e\.g\. 'a'"):
        Tokenizer.load(path)


def test_empty_lines_take_no_id_and_only_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join([*REQUIRED, "", "\u2028", "a", ""]).encode())
    tokenizer = Tokenizer.load(path)
    assert tokenizer.tokens == [*REQUIRED, "\u2028", "a"]
    assert tokenizer.encode("\u2028a") == [len(REQUIRED), len(REQUIRED) + 1]


def test_the_tables_of_matching_are_made_at_the_first_text(small_vocabulary: Tokenizer) -> None:
    """Training from a token index matches no text."""
    tokenizer = Tokenizer(small_vocabulary.tokens)
    assert tokenizer.fingerprint and tokenizer.decode([tokenizer.unk])
    assert "_trie" not in vars(tokenizer)
    tokenizer.encode("a")
    assert "_trie" in vars(tokenizer)


@pytest.mark.parametrize("text", ["abcdefgh", "abcdefg", "abcdefghi", "abcdx", "ab", "abcdefgabcd"])
@pytest.mark.parametrize(
    "order", list(itertools.permutations(["abcdefgh", "abcd", "abcdefxy", "a"]))
)
def test_entries_that_share_beginnings(order: tuple[str, ...], text: str) -> None:
    """In whatever order they stand in the vocabulary."""
    tokenizer = Tokenizer([*REQUIRED, *order])
    expected: list[str] = []
    while text:
        found = max((e for e in order if text.startswith(e)), key=len, default=text[0])
        if found not in order and expected and expected[-1] not in order:
            expected[-1] += found
        else:
            expected.append(found)
        text = text[len(found) :]
    assert [piece.text for piece in split_pieces(tokenizer, "".join(expected))] == expected


def test_fingerprint_depends_on_the_order(small_vocabulary: Tokenizer) -> None:
    other = Tokenizer([*small_vocabulary.tokens[:-2], *small_vocabulary.tokens[:-3:-1]])
    assert sorted(other.tokens) == sorted(small_vocabulary.tokens)
    assert other.fingerprint != small_vocabulary.fingerprint
    assert Tokenizer(small_vocabulary.tokens).fingerprint == small_vocabulary.fingerprint
