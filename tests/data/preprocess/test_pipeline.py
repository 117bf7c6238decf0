"""Preprocessing as a library; tests/test_preprocess_dataset.py has the script."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from preprocess_support import assert_same_index, bee_data, make, numbers, read, record, tree, write
from properties import examples

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.preprocess import gather
from cpm_bee.data.token_index import reader as index
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.errors import InputError
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer


@pytest.fixture
def bee(tmp_path: Path) -> Path:
    return bee_data(tmp_path)


def test_overwrite_spares_what_is_no_dataset(bee: Path) -> None:
    (bee / "bin" / "train").mkdir(parents=True)
    (bee / "bin" / "train" / "thesis.txt").write_text("x")
    before = tree(bee)
    with pytest.raises(InputError, match="not a dataset"):
        make(bee, overwrite=True)
    assert tree(bee) == before


# ------------------------------------------------------------------ the shuffling


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 1000, 10])
def test_same_input_and_seed_same_bytes(bee: Path, bucket_bytes: int) -> None:
    first = tree(make(bee, "first", bucket_bytes=bucket_bytes))
    assert tree(make(bee, "second", bucket_bytes=bucket_bytes)) == first
    other = make(bee, "third", bucket_bytes=bucket_bytes, seed=2)
    assert tree(other)["train/ccpm_data"] != first["train/ccpm_data"]
    assert sorted(numbers(other / "train")) == list(range(300))


def test_the_name_of_the_file_plays_no_part(bee: Path) -> None:
    (bee / "bee_data" / "copy.jsonl").write_bytes((bee / "bee_data" / "eval.jsonl").read_bytes())
    made = tree(make(bee))
    assert made["copy/ccpm_data"] == made["eval/ccpm_data"]


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 500])
def test_every_place_is_equally_likely(
    tmp_path: Path, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, rounds = 30, 150
    # No waiting for the disk 150 times.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write(tmp_path / "bee_data" / "a.jsonl", count)
    total = [0.0] * count
    ordered = 0
    for seed in range(rounds):
        folder = make(tmp_path, f"bin{seed}", seed=seed, bucket_bytes=bucket_bytes)
        found = numbers(folder / "a")
        for position, number in enumerate(found):
            total[number] += position
        ordered += sum(b == a + 1 for a, b in itertools.pairwise(found))
    # The mean position has standard deviation 0.71 over 150 rounds: five of them.
    mean = (count - 1) / 2
    assert all(abs(positions / rounds - mean) < 3.6 for positions in total)
    # Neighbours stay neighbours with probability 1/30: 145 expected, standard deviation 12.
    assert 85 < ordered < 205


@pytest.mark.parametrize("chunk_bytes", [1, 50, 1000, 1 << 20])
def test_chunks_end_anywhere(bee: Path, chunk_bytes: int) -> None:
    """A record belongs to the chunk that it begins in; lines are counted over all chunks."""
    path = bee / "bee_data" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:40]
    long = json.dumps({"input": "长" * 500, "<ans>": ""}, ensure_ascii=False)
    text = "\ufeff" + "\r\n".join([*lines[:20], "", long, "  ", *lines[20:]])
    path.write_text(text, encoding="utf-8", newline="")
    made = read(make(bee, chunk_bytes=chunk_bytes) / "train")
    expected = [json.loads(line) for line in [*lines, long]]
    assert sorted(map(str, made)) == sorted(map(str, expected))
    path.write_text(text + "\n{", encoding="utf-8", newline="")
    with pytest.raises(InputError, match=r"train\.jsonl:44: not valid JSON"):
        make(bee, "second", chunk_bytes=chunk_bytes)


def test_problems_come_in_the_order_of_lines(bee: Path) -> None:
    path = bee / "bee_data" / "train.jsonl"
    path.write_text("{:\n" * 3000, encoding="utf-8")
    with pytest.raises(InputError, match="3000 problems") as caught:
        make(bee, chunk_bytes=5000, bucket_bytes=100)
    shown = [line for line in str(caught.value).splitlines() if "not valid JSON" in line]
    positions = [f"  {path}:{number}: " for number in range(1, 1001)]
    assert len(shown) == 1000
    assert all(map(str.startswith, shown, positions))
    assert "... and 2000 more" in str(caught.value)


def test_what_is_no_text_is_said_once(bee: Path) -> None:
    (bee / "bee_data" / "train.jsonl").write_bytes("春\n".encode("gbk") * 500)
    with pytest.raises(InputError, match=r"1 problems.*\n.*train\.jsonl:1: not UTF-8"):
        make(bee, chunk_bytes=100)


@pytest.mark.parametrize("tokenizer", [None, tiny.TOKENIZER], ids=["plain", "index"])
def test_no_chunk_is_read_for_a_bucket_without_its_records(
    tmp_path: Path, tokenizer: Tokenizer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of few bytes make many chunks and buckets, nearly all without records."""
    count, reads = 30, 0
    for name in ("read_sizes", "read_part"):
        original = getattr(gather, name)

        def counted(path: Path, bucket: int, original: Any = original) -> Any:
            nonlocal reads
            reads += 1
            return original(path, bucket)

        monkeypatch.setattr(gather, name, counted)
    write(tmp_path / "bee_data" / "a.jsonl", count)
    folder = make(tmp_path, bucket_bytes=20, chunk_bytes=20, tokenizer=tokenizer)
    assert reads <= 2 * count
    assert sorted(numbers(folder / "a")) == list(range(count))
    if tokenizer is not None:
        assert_same_index(folder / "a", tmp_path, tokenizer)


def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    path = write(tmp_path / "bee_data" / "train.jsonl", 6_000)
    piece = path.stat().st_size // 40
    write(tmp_path / "before" / "bee_data" / "train.jsonl", 10)
    make(tmp_path / "before")  # what is imported late is not counted
    tracemalloc.start()
    folder = make(tmp_path, bucket_bytes=piece, chunk_bytes=piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * piece + 100_000
    assert sorted(numbers(folder / "train")) == list(range(6_000))
    files = {f"train/{name}" for name in ("meta.bin", "checksums.json", "ccpm_data")}
    assert set(tree(folder)) == {"train", *files}


# ------------------------------------------------------------------ the token index


@pytest.mark.parametrize("workers", [1, 2])
def test_the_index_is_that_of_training(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples: list[Record] = [
        *map(record, range(200)),
        {"input": "é 漢 é", "<ans>": {"a": "b", "x": "ü"}},
        {"input": {"a": {"b": "<mask_0><mask_1>"}}, "<ans>": "<mask_1>"},
    ]
    (tmp_path / "bee_data").mkdir()
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in examples * 3]
    (tmp_path / "bee_data" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {"bucket_bytes": 7000, "chunk_bytes": 3000, "workers": workers}
    folder = make(tmp_path, tokenizer=tiny.TOKENIZER, **options)
    assert_same_index(folder / "train", tmp_path, tiny.TOKENIZER)
    monkeypatch.delattr(index, "build")  # training finds it
    assert len(TokenIndex.of(BinaryDataset(folder / "train"), tiny.TOKENIZER)) == 606
    # The data itself does not depend on it.
    plain = make(tmp_path, "plain", bucket_bytes=7000, chunk_bytes=3000)
    assert tree(plain).items() <= tree(folder).items()


@examples(10)
@given(st.lists(tiny.records(), min_size=1, max_size=8), st.integers(1, 20), st.integers(1, 20))
def test_the_index_of_any_records(records: list[Record], chunks: int, buckets: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "bee_data").mkdir()
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (path / "bee_data" / "a.jsonl").write_text(lines, encoding="utf-8")
        # A number of pieces, not of bytes: records of thousands of bytes cut into pieces of one
        # make thousands of chunks and buckets, which take minutes and show nothing more.
        pieces = {
            "chunk_bytes": -(-len(lines) // chunks),
            "bucket_bytes": -(-len(lines) // buckets),
        }
        folder = make(path, tokenizer=tiny.TOKENIZER, block_size=1 << 20, **pieces)
        assert_same_index(folder / "a", path, tiny.TOKENIZER)


# ------------------------------------------------------------------ what is said of answers


def test_answers_that_are_missing_or_cannot_be_written_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ["a", "", "é①", "b", "", "漢"]
    lines = [json.dumps({"input": "a", "<ans>": a}, ensure_ascii=False) + "\n" for a in answers]
    path = tmp_path / "bee_data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(lines), encoding="utf-8")
    for chunk_bytes in (None, 40):
        caplog.clear()
        make(tmp_path, tokenizer=tiny.TOKENIZER, chunk_bytes=chunk_bytes, overwrite=True)
        missing, unwritable = [r.getMessage() for r in caplog.records]
        assert f"{path}: 2 of 6 records have no answer" in missing
        assert "the first one on line 2" in missing
        assert f"{path}: 2 of 6 records have an answer that can never be generated" in unwritable
        assert f"\n  {path}:3: 'é①'\n  {path}:6: '漢'" in unwritable


def test_all_records_that_the_vocabulary_lacks_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["a", "<strange_0>", "b", "<other>"] * 8
    lines = [json.dumps({"input": text, "<ans>": "a"}) + "\n" for text in texts]
    path = tmp_path / "bee_data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(lines), encoding="utf-8")
    make(tmp_path, tokenizer=tiny.TOKENIZER, tokens_needed=False, chunk_bytes=60)
    [message] = [r.getMessage() for r in caplog.records]
    assert "cannot encode 16 of the records" in message
    assert f"{path}:2: special token <strange_0>" in message
    assert f"... and 6 more in {path}" in message


def test_escape_takes_texts_as_plain(tmp_path: Path) -> None:
    path = tmp_path / "bee_data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text('{"input": "<s>a</s> <mask_0>", "<ans>": {"<mask_0>": "1 << 2"}}\n')
    with pytest.raises(InputError, match="--escape"):
        make(tmp_path)
    folder = make(tmp_path, escape=True)
    assert read(folder / "train") == [
        {"input": "<<s>a<</s> <mask_0>", "<ans>": {"<mask_0>": "1 <<<< 2"}}
    ]
