from __future__ import annotations

import json
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from dataset_writer import DatasetWriter
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.data.bin_dataset import BinaryDataset, payload_limit
from cpm_bee.data.record_pickle import decode, encode
from cpm_bee.errors import InputError
from cpm_bee.records import Record
from cpm_bee.tokenizer import escape

BLOCK = 256
RECORDS: list[Record] = [{"input": "春" * (i % 7), "<ans>": f"{i}"} for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "set", "data", BLOCK) as writer:
        for record in RECORDS:
            writer.write(record)
    return tmp_path / "set"


def read_all(folder: Path) -> list[Record]:
    dataset = BinaryDataset(folder)
    result = [dataset.read(index, offset) for index, offset, _ in dataset]
    assert result == [decode(payload) for _, _, payload in dataset]
    assert len(result) == len(dataset)
    return result


def edit_meta(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "meta.bin").read_text())
    (folder / "meta.bin").write_text(json.dumps({**value, **changes}) + "\n")


def edit_data(folder: Path, offset: int, data: bytes) -> None:
    with open(folder / "data", "r+b") as file:
        file.seek(offset)
        file.write(data)


# ------------------------------------------------------------------ agreement with other tools


def test_golden_is_read(golden: Path) -> None:
    lines = (golden / "bin_small_blocks.jsonl").read_text(encoding="utf-8").splitlines()
    assert read_all(golden / "bin_small_blocks") == [json.loads(line) for line in lines]


def test_golden_is_written_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    theirs = golden / "bin_small_blocks"
    block_size = BinaryDataset(theirs).files[0].block_size
    with DatasetWriter(tmp_path / "set", "ccpm_data", block_size) as writer:
        for line in (golden / "bin_small_blocks.jsonl").read_text(encoding="utf-8").splitlines():
            writer.write(json.loads(line))
    assert (tmp_path / "set" / "ccpm_data").read_bytes() == (theirs / "ccpm_data").read_bytes()
    ours = json.loads((tmp_path / "set" / "meta.bin").read_text())
    assert ours == json.loads((theirs / "meta.bin").read_text())


# ------------------------------------------------------------------ round trip

texts = st.text(st.sampled_from("a<春"), max_size=20).map(escape)
trees = st.recursive(texts, lambda inner: st.dictionaries(texts, inner, max_size=3), max_leaves=6)


@given(st.lists(st.dictionaries(texts, trees, max_size=3)), st.integers(7, 400))
def test_round_trip_with_tiny_blocks(fields: list[dict], block_size: int) -> None:
    records = [{**record, "<ans>": "a"} for record in fields]
    fitting = [r for r in records if len(encode(r)) <= payload_limit(block_size)]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name) / "set"
        with DatasetWriter(folder, "data", block_size) as writer:
            for record in records:
                if record in fitting:
                    writer.write(record)
                else:
                    with pytest.raises(InputError, match="does not fit into a block"):
                        writer.write(record)
        assert read_all(folder) == fitting
        data = (folder / "data").read_bytes()
        info = json.loads((folder / "meta.bin").read_text())
        assert len(data) == (info["block_end"] - info["block_begin"]) * block_size
        assert info["nlines"] == len(fitting)
        assert info["nbytes"] == sum(4 + len(encode(r)) for r in fitting)
        assert all(data[end - 1] == 0 for end in range(block_size, len(data) + 1, block_size))


def test_the_largest_record_of_a_block(tmp_path: Path) -> None:
    record: Record = {"<ans>": "a" * 100}
    size = len(encode(record)) + 1 + 4 + 1
    with DatasetWriter(tmp_path / "fits", "data", size) as writer:
        writer.write(record)
        writer.write(record)
    assert read_all(tmp_path / "fits") == [record, record]
    with DatasetWriter(tmp_path / "large", "data", size - 1) as writer, pytest.raises(InputError):
        writer.write(record)


def test_several_files_and_masks(folder: Path) -> None:
    (folder / "more").write_bytes((folder / "data").read_bytes())
    first = json.loads((folder / "meta.bin").read_text())
    blocks = first["block_end"]
    second = {**first, "file_name": "more", "block_begin": blocks, "block_end": 2 * blocks}
    lines = [first, second, {**first, "file_name": "gone", "mask": True}]
    (folder / "meta.bin").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_all(folder) == RECORDS + RECORDS
    assert {index for index, _, _ in BinaryDataset(folder)} == {0, 1}
    lines[0]["mask"] = True
    (folder / "meta.bin").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_all(folder) == RECORDS
    assert {index for index, _, _ in BinaryDataset(folder)} == {1}


def test_an_exception_leaves_no_meta(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "set", "data", BLOCK) as writer:
        writer.write(RECORDS[0])
        raise KeyboardInterrupt
    with pytest.raises(InputError, match=r"holds no meta\.bin"):
        BinaryDataset(tmp_path / "set")


def test_an_existing_data_file_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        DatasetWriter(folder, "data")
    assert read_all(folder) == RECORDS


# ------------------------------------------------------------------ damage


def test_what_is_no_dataset(tmp_path: Path) -> None:
    for folder_name, reason in [("nothing", "no such folder"), ("", r"holds no meta\.bin")]:
        with pytest.raises(InputError, match=reason) as caught:
            BinaryDataset(tmp_path / folder_name)
        assert str(tmp_path / folder_name) in str(caught.value)
        assert "python preprocess_dataset.py --input" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nlines": "40"}, "nlines: expected a number from 0, this is '40'"),
        ({"nbytes": -1}, "nbytes: expected a number from 0"),
        ({"block_begin": True}, "block_begin: expected a number"),
        ({"block_size": 0}, "block_size: expected a number from 1"),
        ({"block_begin": 99}, "block_end is less than block_begin"),
        ({"mask": 0}, "mask: expected true or false"),
        ({"file_name": 3}, "file_name: expected the name of a file"),
        ({"file_name": "../set/data"}, "file_name: expected the name of a file"),
        ({"file_name": "/etc/passwd"}, "file_name: expected the name of a file"),
        ({"file_name": "gone"}, "gone: no such file"),
        ({"block_size": BLOCK * 2}, "cut off"),
        ({"block_end": 1}, "meta.bin says 256"),
    ],
)
def test_wrong_values_in_meta(folder: Path, changes: dict, reason: str) -> None:
    edit_meta(folder, **changes)
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        BinaryDataset(folder)
    assert str(folder) in str(caught.value)


def test_all_problems_of_meta_are_named(folder: Path) -> None:
    good = (folder / "meta.bin").read_text()
    lacking = {
        key: value for key, value in json.loads(good).items() if key not in ("mask", "nlines")
    }
    (folder / "meta.bin").write_text(good + json.dumps(lacking) + "\n[]\n{\n")
    with pytest.raises(InputError) as caught:
        BinaryDataset(folder)
    message = str(caught.value)
    assert "meta.bin:1" not in message
    assert "meta.bin:2: lacks nlines, mask" in message
    assert "meta.bin:3: expected a JSON object" in message
    assert "meta.bin:4: not valid JSON" in message
    for text in ("", "\n"):
        (folder / "meta.bin").write_text(text)
        with pytest.raises(InputError, match="lists no data files"):
            BinaryDataset(folder)


def test_a_file_that_is_cut_off(folder: Path) -> None:
    data = (folder / "data").read_bytes()
    (folder / "data").write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"data: has {len(data) - 1} bytes.*: cut off"):
        BinaryDataset(folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x20", "byte {offset}: no record begins there"),
        (b"\x00", "records, meta.bin says 40"),
        (b"\x1f" + struct.pack("<I", BLOCK), "byte {offset}: the record (256 bytes) crosses"),
        (b"\x1f\xff\xff\xff\xff", "byte {offset}: the record (4294967295 bytes) crosses"),
    ],
)
def test_damaged_frames(folder: Path, data: bytes, reason: str) -> None:
    offset = [offset for _, offset, _ in BinaryDataset(folder)][11]
    edit_data(folder, offset, data)
    dataset = BinaryDataset(folder)
    seen = 0
    with pytest.raises(InputError, match=re.escape(reason.format(offset=offset))) as caught:
        for _ in dataset:
            seen += 1
    assert seen >= 11
    assert str(folder / "data") in str(caught.value)


def test_a_record_that_begins_too_near_the_end_of_its_block(tmp_path: Path) -> None:
    payload = encode({"<ans>": "a" * 20})
    size = 5 + len(payload) + 3
    with DatasetWriter(tmp_path / "set", "data", size) as writer:
        writer.write_payload(payload)
    edit_data(tmp_path / "set", size - 3, b"\x1f\x00\x00")
    with pytest.raises(InputError, match=f"byte {size - 3}: the record crosses"):
        list(BinaryDataset(tmp_path / "set"))


def test_a_damaged_payload_is_named_on_reading(folder: Path) -> None:
    [(index, offset, payload)] = list(BinaryDataset(folder))[5:6]
    edit_data(folder, offset + 5, b"\xff" * len(payload))
    with pytest.raises(InputError, match=f"data, byte {offset}: not a readable pickle"):
        BinaryDataset(folder).read(index, offset)


def test_reading_where_no_record_begins(folder: Path) -> None:
    dataset = BinaryDataset(folder)
    offset = next(iter(dataset))[1]
    assert dataset.read(0, offset) == RECORDS[0]
    for wrong in (offset + 1, -1, 10**9):
        with pytest.raises(InputError, match=f"byte {wrong}: no record begins there"):
            dataset.read(0, wrong)


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = BinaryDataset(folder).fingerprint
    (tmp_path / "copy").mkdir()
    for name in ("data", "meta.bin"):
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    assert BinaryDataset(tmp_path / "copy").fingerprint == before
    byte = (folder / "data").read_bytes()[20:21]
    edit_data(folder, 20, b"\x01" if byte != b"\x01" else b"\x02")
    assert BinaryDataset(folder).fingerprint != before
    edit_data(folder, 20, byte)
    assert BinaryDataset(folder).fingerprint == before
    edit_meta(folder, nbytes=1)
    assert BinaryDataset(folder).fingerprint != before
