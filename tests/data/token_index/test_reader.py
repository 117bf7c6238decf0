from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_support
from dataset_writer import DatasetWriter
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.batch import Stream, collate, extension_pairs, make_batch
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index import reader as index_module
from cpm_bee.data.token_index import soundness
from cpm_bee.data.token_index.arrays import ARRAYS
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.data.token_index.writer import folder_name
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.errors import DamagedFile, InputError
from cpm_bee.files import BusyError, atomic_folder, exclusive
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

RECORDS: list[Record] = [
    {"input": "春 é", "<ans>": "é 天"},
    {"input": "ab<mask_0><mask_1>", "<ans>": {"<mask_0>": "ü", "<mask_1>": "漢 ü"}},
    {"<ans>": "", "input": {"a": {"b": {"x": "春天"}}}},
    {"input": "é ü 漢", "<ans>": {"a": {"b": "漢", "x": "風"}}},
    {"input": "春 é", "<ans>": "é 天"},
    {"input": "b", "<ans>": {"a": {}, "b": "x"}},
]


def write(folder: Path, records: list[Record]) -> Path:
    with DatasetWriter(folder, "data", 4096) as writer:
        for record in records:
            writer.write(record)
    return folder


def open_index(folder: Path, tokenizer: Tokenizer = tiny.TOKENIZER) -> TokenIndex:
    return TokenIndex.of(BinaryDataset(folder), tokenizer)


def assert_same(a: EncodedRecord, b: EncodedRecord) -> None:
    for name in ("ids", "subs", "segments", "context"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert a.tree == b.tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", RECORDS)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which an index was built, in order."""
    calls = []
    real = index_module.build

    def counted(folder: Path, dataset: BinaryDataset, tokenizer: Tokenizer) -> None:
        calls.append(folder)
        real(folder, dataset, tokenizer)

    monkeypatch.setattr(index_module, "build", counted)
    return calls


def index_folder(folder: Path) -> Path:
    (found,) = folder.glob("token_index-*")
    return found


# ------------------------------------------------------------------ what it holds


def check(records: list[Record], folder: Path, seed: int) -> None:
    index = open_index(folder)
    encoded = tiny.encode(records)
    assert len(index) == len(records)
    for n, expected in enumerate(encoded):
        assert index.source(n) == records[n]
        assert_same(index.record(n), expected)
        assert index.lengths[n] == len(expected)
        assert index.num_targets[n] == collate([expected], tiny.TOKENIZER).num_targets
        # Shuffled as the encoder shuffles, and where there is no choice not at all.
        shuffled = index.record(n, random.Random(seed))
        assert_same(shuffled, Encoder(tiny.TOKENIZER).encode(records[n], rng=random.Random(seed)))
    rng = random.Random(seed)
    for _ in range(5):
        chosen = rng.sample(range(len(records)), rng.randint(0, len(records)))
        pairs = index.extension_pairs(index.largest_subs(chosen))
        assert pairs == sorted(set(pairs))
        assert set(pairs) == set(extension_pairs([encoded[n] for n in chosen]))
        # Whatever the order of the answers, the same pairs occur.
        shuffled_pairs = extension_pairs([index.record(n, rng) for n in chosen])
        assert set(pairs) == set(shuffled_pairs)
        check_streams(index, chosen, pairs, seed)


def check_streams(
    index: TokenIndex, chosen: list[int], pairs: list[tuple[int, int]], seed: int
) -> None:
    """Streams hold what single records do, and so do the batches made of them."""

    def rng_of(number: int) -> random.Random:
        return random.Random(f"{seed}/{number}")

    for generators in (None, rng_of):
        stream = index.stream(chosen, generators)
        single = [index.record(n, generators and generators(n)) for n in chosen]
        for field in dataclasses.fields(Stream):
            found = getattr(stream, field.name)
            expected = getattr(Stream.of(single), field.name)
            np.testing.assert_array_equal(found, expected, field.name)
            assert found.dtype == expected.dtype, field.name
        batch = make_batch(stream, tiny.TOKENIZER, pairs)
        for name, value in vars(collate(single, tiny.TOKENIZER, pairs)).items():
            found = getattr(batch, name)
            assert torch.equal(found, value) if torch.is_tensor(value) else found == value, name


def test_it_holds_what_the_encoder_makes(folder: Path) -> None:
    check(RECORDS, folder, seed=0)


@examples(10)
@given(st.lists(tiny.records(), max_size=6), st.integers(0, 1000))
def test_any_records(records: list[Record], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(records, write(Path(folder) / "set", records), seed)


def test_several_data_files_and_blocks(tmp_path: Path) -> None:
    """Records of masked files are left out, offsets and file numbers are kept."""
    parts = [write(tmp_path / str(i), RECORDS[i : i + 2] * 60) for i in range(3)]
    lines = []
    begin = 0
    (tmp_path / "set").mkdir()
    for i, part in enumerate(parts):
        info = json.loads((part / "meta.bin").read_text())
        blocks = info["block_end"]
        assert blocks > 1
        info |= {"file_name": f"data{i}", "mask": i == 1}
        info |= {"block_begin": begin, "block_end": begin + blocks}
        begin += blocks
        (part / "data").rename(tmp_path / "set" / f"data{i}")
        lines.append(json.dumps(info))
    (tmp_path / "set" / "meta.bin").write_text("\n".join(lines) + "\n")
    check(RECORDS[0:2] * 60 + RECORDS[2:4] * 60, tmp_path / "set", seed=1)


def test_only_records_with_a_choice_are_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(folder)
    read = []
    monkeypatch.setattr(index, "source", lambda n: read.append(n) or RECORDS[n])
    for n in range(len(RECORDS)):
        index.record(n)
        index.record(n, random.Random(0))
    assert read == [1, 3, 5]
    index.stream(range(len(RECORDS)))
    assert read == [1, 3, 5]
    index.stream([5, 4, 3], lambda number: random.Random(number))
    assert read == [1, 3, 5, 5, 3]


def test_shuffled_answers(folder: Path) -> None:
    index = open_index(folder)
    orders = {tuple(index.record(1, random.Random(seed)).ids.tolist()) for seed in range(20)}
    assert len(orders) == 2
    assert {len(order) for order in orders} == {index.lengths[1]}


def test_an_empty_dataset(tmp_path: Path) -> None:
    index = open_index(write(tmp_path / "set", []))
    assert len(index) == 0
    assert index.largest_subs([]) == index.extension_pairs([]) == []
    assert len(index.stream([]).ids) == 0
    assert index.lengths.tolist() == index.num_targets.tolist() == []
    assert len(open_index(tmp_path / "set")) == 0  # and from disk


def test_records_without_extension(tmp_path: Path) -> None:
    check([{"<ans>": "a"}], write(tmp_path / "set", [{"<ans>": "a"}]), seed=0)


def test_its_arrays_are_mapped_read_only(folder: Path) -> None:
    index = open_index(folder)
    record = index.record(0)
    with pytest.raises(ValueError, match="read-only"):
        record.ids[0] = 1
    stream = index.stream([0, 1])
    stream.ids[:] = stream.subs[:] = stream.segments[:] = 0  # a stream is its own
    stream.relations[:] = stream.context[:] = 0
    assert_same(index.record(0), tiny.encode(RECORDS)[0])
    np.testing.assert_array_equal(index.stream([0]).context, record.context)


def test_the_largest_subs(folder: Path) -> None:
    index = open_index(folder)
    mask, unk = tiny.TOKENIZER.ids["<mask>"], tiny.TOKENIZER.unk
    assert index.extension_vocabulary.tolist() == sorted([unk, mask])
    assert unk < mask
    assert index.largest_subs([1, 5]) == [1, 1]
    assert index.largest_subs([3]) == [3, 0]
    assert index.largest_subs([0, 2]) == [0, 0]
    assert index.extension_pairs([0, 2]) == [(mask, 1), (mask, 2)]


# ------------------------------------------------------------------ when it is made


def test_it_is_made_once(folder: Path, builds: list[Path]) -> None:
    before = (folder / "meta.bin").read_bytes(), (folder / "data").read_bytes()
    open_index(folder)
    open_index(folder)
    assert len(builds) == 1
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["data", "meta.bin"]
    assert before == ((folder / "meta.bin").read_bytes(), (folder / "data").read_bytes())
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [index_folder(folder).name]


def test_each_vocabulary_has_its_own(folder: Path, builds: list[Path]) -> None:
    other = Tokenizer([*tiny.TOKENIZER.tokens, "é"])
    encoder = Encoder(other)
    for _ in range(2):
        assert_same(open_index(folder).record(0), tiny.encode(RECORDS)[0])
        assert_same(open_index(folder, other).record(0), encoder.encode(RECORDS[0]))
    assert len(builds) == 2


def test_it_is_made_again_for_changed_data(
    folder: Path, tmp_path: Path, builds: list[Path]
) -> None:
    open_index(folder)
    changed = [*RECORDS[:-1], {"input": "x", "<ans>": {"a": {}, "b": "b"}}]  # same sizes everywhere
    other = write(tmp_path / "other", changed)
    assert (other / "meta.bin").read_bytes() == (folder / "meta.bin").read_bytes()
    (other / "data").replace(folder / "data")
    check(changed, folder, seed=0)
    open_index(folder)
    assert len(builds) == 2


def remove_info(index: Path) -> None:
    (index / "index.json").unlink()


def cut_info(index: Path) -> None:
    text = (index / "index.json").read_text()
    (index / "index.json").write_text(text[: len(text) // 2])


def other_json(index: Path) -> None:
    (index / "index.json").write_text("[1, 2]")


def wrong_types(index: Path) -> None:
    info = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**info, "trees": [3], "tokens": "many"}))


def lost_key(index: Path) -> None:
    info = json.loads((index / "index.json").read_text())
    del info["records"]
    (index / "index.json").write_text(json.dumps(info))


def cut_array(index: Path) -> None:
    with open(index / "segments", "r+b") as file:
        file.truncate(10)


def lost_array(index: Path) -> None:
    (index / "extension_subs").unlink()


def emptied(index: Path) -> None:
    for path in index.iterdir():
        path.write_bytes(b"")


def other_vocabulary(index: Path) -> None:
    # The folder's name holds only the beginning of the vocabulary's fingerprint.
    info = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**info, "vocabulary": info["vocabulary"][:12]}))


def binary_info(index: Path) -> None:
    (index / "index.json").write_bytes(b"\xff\xfe\x00")


DAMAGE = [remove_info, cut_info, other_json, wrong_types, lost_key, cut_array, lost_array, emptied]
DAMAGE += [other_vocabulary, binary_info]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again(
    folder: Path, builds: list[Path], damage: Callable[[Path], None]
) -> None:
    open_index(folder)
    damage(index_folder(folder))
    check(RECORDS, folder, seed=0)
    assert len(builds) == 2


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*ARRAYS, "index.json"])
def test_a_changed_bit_is_named_and_the_index_made_again(
    folder: Path, builds: list[Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    open_index(folder)
    path = index_folder(folder) / name
    flip(path, path.read_bytes().index(b'"vocabulary": "') + 20 if name == "index.json" else 0)
    check(RECORDS, folder, seed=0)
    assert len(builds) == 2
    (told,) = caplog.messages
    assert str(path) in told and "(checksum); the token index has to be made again" in told


@pytest.mark.parametrize("name", ["ids", "subs", "segments", "extension_ids", "extension_subs"])
def test_a_large_index_is_compared_as_it_is_read(
    folder: Path, builds: list[Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_index(folder)
    monkeypatch.setattr(soundness, "_SMALL", 0)
    check(RECORDS, folder, seed=0)
    path = index_folder(folder) / name
    flip(path, 0)
    index = open_index(folder)
    told = rf"{path}: bytes 0 to \d+ have changed .*\(checksum\)\nremove .*rm -r {path.parent}"
    for read in (index.stream, index.largest_subs):
        if name.startswith("extension") or read == index.stream:
            with pytest.raises(DamagedFile, match=told):
                read([0, 1])
    if not name.startswith("extension"):
        with pytest.raises(DamagedFile, match=told):
            index.record(0)
    assert len(builds) == 1


@pytest.mark.parametrize("changed", ["", "checksums", "crc32"])
def test_an_index_of_an_earlier_version_is_read(
    folder: Path, builds: list[Path], changed: str
) -> None:
    """It has no checksums. A changed name of a field does not make one of it."""
    open_index(folder)
    path = index_folder(folder) / "index.json"
    info = json.loads(path.read_text())
    if changed:
        info[changed[:-1] + "q"] = info.pop(changed)
    else:
        del info["checksums"], info["crc32"]
    path.write_text(json.dumps(info))
    check(RECORDS, folder, seed=0)
    assert len(builds) == (2 if changed else 1)


def test_damage_of_the_dataset_is_not_taken_for_that_of_the_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_support.make_dataset(tmp_path, "set", RECORDS)
    open_index(folder)
    caplog.clear()
    flip(folder / "data", 100)
    with pytest.raises(DamagedFile, match=f"{folder / 'data'}: bytes 0 to"):
        open_index(folder)
    assert caplog.messages == []


def test_a_killed_run_leaves_nothing_that_is_taken_for_an_index(
    folder: Path, builds: list[Path]
) -> None:
    open_index(folder)
    done = index_folder(folder)
    partial = done.with_name(f".{done.name}.partial")
    done.rename(partial)
    (partial / "ids").write_bytes(b"half")
    check(RECORDS, folder, seed=0)
    assert len(builds) == 2
    assert not partial.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_read_only_data(
    folder: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Tests may run as root, whom no permission stops: the system's refusal is played."""

    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    index = open_index(folder)
    assert len(builds) == 1
    own = builds[0]
    assert folder not in own.parents and own.is_dir()
    for n, expected in enumerate(tiny.encode(RECORDS)):
        assert_same(index.record(n), expected)
    assert not list(folder.glob("*token_index*"))
    del index
    assert not own.exists()  # it lived as long as its index


def test_a_full_disk_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_module, "build", full)
    with pytest.raises(OSError, match="No space left"):
        open_index(folder)
    assert not list(folder.glob("*token_index*"))


def test_another_run_is_making_it(folder: Path, builds: list[Path]) -> None:
    open_index(folder)
    done = index_folder(folder)
    emptied(done)
    with atomic_folder(done, replace=True) as other:
        index = open_index(folder)
        assert other.is_dir()
        assert len(builds) == 2 and folder not in builds[1].parents
        assert_same(index.record(0), tiny.encode(RECORDS)[0])


# ------------------------------------------------------------------ records that cannot be read


def test_another_run_is_making_it_and_this_one_is_refused(folder: Path, builds: list[Path]) -> None:
    """On rank 0; the lock of a killed process is none, and an index made meanwhile is used."""
    dataset = BinaryDataset(folder)
    lock = folder / f".{folder_name(tiny.TOKENIZER)}.lock"
    with exclusive(lock, "holds it"):
        with pytest.raises(BusyError) as caught:
            TokenIndex.of(dataset, tiny.TOKENIZER, refuse_busy=True)
        told = str(caught.value)
        assert f"process {os.getpid()} on " in told and "making the token index" in told
        assert "start this run again when that is done" in told and not builds
    lock.write_text("process 1 on a machine, killed")
    TokenIndex.of(dataset, tiny.TOKENIZER, refuse_busy=True)
    assert len(builds) == 1 and not lock.exists()


def test_all_records_with_unknown_special_tokens_are_listed(tmp_path: Path) -> None:
    bad: list[Record] = [{"input": f"<strange_{i}>", "<ans>": ""} for i in range(3)]
    records = [bad[0], *RECORDS, bad[1], bad[2]]
    folder = write(tmp_path / "set", records)
    with pytest.raises(InputError) as caught:
        open_index(folder)
    message = str(caught.value)
    assert all(f"special token <strange_{i}>" in message for i in range(3))
    offsets = [offset for _, offset, _ in BinaryDataset(folder)]
    for n in (0, 7, 8):
        assert f"{folder / 'data'}, byte {offsets[n]}: " in message
    assert len(message.splitlines()) == 4
    assert not list(folder.glob("*token_index*"))
    assert not list(folder.glob(".token_index*"))
