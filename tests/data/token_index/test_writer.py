from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from dataset_writer import DatasetWriter
from preprocess_support import record, tree

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index import writer as index_writer
from cpm_bee.data.token_index.arrays import ARRAYS
from cpm_bee.data.token_index.writer import FORMAT, build, folder_name
from cpm_bee.errors import InputError
from cpm_bee.records import Record

RECORDS: list[Record] = [
    *map(record, range(30)),
    {"input": "é 漢 é", "<ans>": {"a": "b", "x": "ü"}},
    {"input": {"a": {"b": "<mask_0><mask_1>"}}, "<ans>": "<mask_1>"},
]


def write(folder: Path, records: list[Record]) -> BinaryDataset:
    with DatasetWriter(folder, "data", 4096) as writer:
        for item in records:
            writer.write(item)
    return BinaryDataset(folder)


def make(folder: Path, dataset: BinaryDataset) -> Path:
    folder.mkdir()
    build(folder, dataset, tiny.TOKENIZER)
    return folder


def test_the_folder_names_format_and_vocabulary() -> None:
    assert folder_name(tiny.TOKENIZER) == f"token_index-{FORMAT}-{tiny.TOKENIZER.fingerprint[:12]}"


def test_files_and_info(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", RECORDS)
    made = make(tmp_path / "index", dataset)
    assert {path.name for path in made.iterdir()} == {"index.json", *ARRAYS}
    info = json.loads((made / "index.json").read_text())
    encoded = tiny.encode(RECORDS)
    assert info["records"] == len(RECORDS)
    assert info["tokens"] == sum(map(len, encoded))
    for name, (dtype, counted) in ARRAYS.items():
        assert (made / name).stat().st_size == info[counted] * np.dtype(dtype).itemsize
    ids = {int(i) for e in encoded for i in e.ids[e.subs > 0]}
    assert info["extension_vocabulary"] == sorted(ids)
    assert ids == {tiny.TOKENIZER.ids["<mask>"], tiny.TOKENIZER.unk}
    trees = [(tuple(depths), tuple(map(bool, p))) for depths, p in info["trees"]]
    assert trees == sorted({tuple(e.tree) for e in encoded})
    numbers = np.fromfile(made / "trees", dtype=np.int32)
    assert [trees[n] for n in numbers] == [tuple(e.tree) for e in encoded]


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_the_size_of_chunks_changes_nothing(
    tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path / "set", RECORDS)
    whole = tree(make(tmp_path / "whole", dataset))
    monkeypatch.setattr(index_writer, "CHUNK_TOKENS", tokens)
    assert tree(make(tmp_path / "parts", dataset)) == whole


def test_all_records_that_cannot_be_encoded_are_listed(tmp_path: Path) -> None:
    bad: list[Record] = [{"input": f"<strange_{i}>", "<ans>": ""} for i in range(3)]
    dataset = write(tmp_path / "set", [bad[0], *RECORDS, *bad[1:]])
    with pytest.raises(InputError, match="cannot read") as caught:
        make(tmp_path / "index", dataset)
    assert [f"<strange_{i}>" in str(caught.value) for i in range(3)] == [True] * 3
    assert str(caught.value).count("set/data, byte ") == 3
    assert not (tmp_path / "index" / "index.json").exists()


def test_an_empty_dataset(tmp_path: Path) -> None:
    made = make(tmp_path / "index", write(tmp_path / "set", []))
    assert {path.name for path in made.iterdir()} == {"index.json", *ARRAYS}
    info = json.loads((made / "index.json").read_text())
    assert (info["records"], info["trees"], info["extension_vocabulary"]) == (0, [], [])
