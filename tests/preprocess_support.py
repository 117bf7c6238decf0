"""Small inputs for preprocessing, and functions that read the results."""

from __future__ import annotations

import json
from pathlib import Path

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.token_index.writer import build, folder_name
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

BLOCK = 4096


def record(number: int) -> Record:
    return {"input": f"第{number}句", "options": {"<option_0>": "a << b"}, "<ans>": "<option_0>"}


def write(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record(i), ensure_ascii=False) + "\n" for i in range(count))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(folder: Path) -> list[Record]:
    dataset = BinaryDataset(folder)
    return [dataset.read(index, offset) for index, offset, _ in dataset]


def numbers(folder: Path) -> list[int]:
    return [int(str(item["input"])[1:-1]) for item in read(folder)]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def bee_data(place: Path) -> Path:
    """Write the records of two datasets to `place`/bee_data; returns `place`."""
    write(place / "bee_data" / "train.jsonl", 300)
    write(place / "bee_data" / "eval.jsonl", 50)
    return place


def make(place: Path, name: str = "bin", **options: object) -> Path:
    chosen: dict = {"seed": 1, "overwrite": False, "block_size": BLOCK, **options}
    preprocess(place / "bee_data", place / name, "ccpm_data", **chosen)
    return place / name


def assert_same_index(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Assert that a dataset's index is, byte for byte, the one that training would make."""
    (made,) = folder.glob("token_index-*")
    assert made.name == folder_name(tokenizer)
    built = tmp_path / "built"
    built.mkdir()
    build(built, BinaryDataset(folder), tokenizer)
    assert tree(made) == tree(built)
