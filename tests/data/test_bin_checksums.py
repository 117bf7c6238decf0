"""`checksums.json` of a dataset: what it finds, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_support

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.errors import DamagedFile

RECORDS = [{"input": "春" * 300, "question": str(i), "<ans>": "天"} for i in range(150)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train_support.make_dataset(tmp_path, "set", RECORDS)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_changed_text_is_named_before_it_is_used(folder: Path) -> None:
    records = list(BinaryDataset(folder))
    flip(folder / "data", 70_000)
    dataset = BinaryDataset(folder)
    assert dataset.read(0, records[0][1])  # in another block
    with pytest.raises(DamagedFile) as caught:
        list(dataset)
    message = str(caught.value)
    assert f"{folder / 'data'}: bytes 65536 to 131071 have changed" in message
    assert "preprocess_dataset.py" in message and f"remove {folder / 'checksums.json'}" in message
    (folder / "checksums.json").unlink()
    assert len(list(BinaryDataset(folder))) == len(RECORDS)  # as datasets of other tools


@pytest.mark.parametrize("offset", [100, -100])
def test_the_bytes_of_the_fingerprint_are_compared(folder: Path, offset: int) -> None:
    flip(folder / "data", offset)
    with pytest.raises(DamagedFile, match="have changed since they were written"):
        _ = BinaryDataset(folder).fingerprint


@pytest.mark.parametrize("content", ["cut", "flipped", "[]", '{"files": 3}', "[" * 100_000])
def test_damaged_checksums_are_named(folder: Path, content: str) -> None:
    path = folder / "checksums.json"
    if content == "flipped":
        flip(path, path.read_bytes().index(b"blocks") + 12)
    else:
        path.write_text(path.read_text()[:-30] if content == "cut" else content)
    with pytest.raises(DamagedFile) as caught:
        BinaryDataset(folder)
    assert f"{path}: has changed" in str(caught.value) and f"rm {path}" in str(caught.value)


def test_a_data_file_that_another_tool_wrote_is_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = train_support.make_dataset(tmp_path / "other", "set", RECORDS[:-1])
    for name in ("data", "meta.bin"):
        (folder / name).write_bytes((other / name).read_bytes())
    assert len(list(BinaryDataset(folder))) == len(RECORDS) - 1
    assert "is about another data, which is read without checksums" in caplog.text


def test_a_second_file_of_another_tool_is_read(folder: Path) -> None:
    (folder / "more").write_bytes((folder / "data").read_bytes())
    line = json.loads((folder / "meta.bin").read_text())
    size = line["block_end"]
    more = {**line, "file_name": "more", "block_begin": size, "block_end": 2 * size}
    with open(folder / "meta.bin", "a") as file:
        file.write(json.dumps(more) + "\n")
    flip(folder / "more", 70_000)  # has no checksums
    assert len(list(BinaryDataset(folder))) == 2 * len(RECORDS)
    flip(folder / "data", 70_000)
    with pytest.raises(DamagedFile):
        list(BinaryDataset(folder))


def test_a_masked_file_is_left_alone(folder: Path) -> None:
    text = (folder / "meta.bin").read_text().replace("false", "true")
    (folder / "meta.bin").write_text(text)
    (folder / "data").unlink()
    assert list(BinaryDataset(folder)) == []
