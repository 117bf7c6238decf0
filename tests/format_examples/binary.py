"""Section 9: binary datasets and the token index."""

from __future__ import annotations

import json
import pickletools
import tempfile
from pathlib import Path

import numpy as np
from dataset_writer import DatasetWriter

from cpm_bee.data.bin_checksums import CHECKSUMS, write_checksums
from cpm_bee.data.bin_dataset import BinaryDataset, frame
from cpm_bee.data.bin_meta import read_meta
from cpm_bee.data.record_pickle import decode, encode
from cpm_bee.data.token_index.arrays import ARRAYS
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.data.token_index.writer import folder_name
from cpm_bee.errors import InputError
from format_examples.common import VOCABULARY, Json, Rows, example


@example
def bin_record(page: Json) -> Rows:
    payload = encode(page("bin"))
    assert decode(payload) == page("bin")
    data = frame(payload)
    rows = [["0", data[:1].hex(" "), "record"], ["1", data[1:5].hex(" "), "length"]]
    operations = [(position or 0, op.name) for op, _, position in pickletools.genops(payload)]
    ends = [*(position for position, _ in operations[1:]), len(payload)]
    for (begin, name), end in zip(operations, ends, strict=True):
        rows.append([str(5 + begin), payload[begin:end].hex(" "), name])
    return rows


@example
def meta_fields(page: Json) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder) / "d", "data") as writer:
            writer.write({"<ans>": ""})
        (line,) = (Path(folder) / "d" / "meta.bin").read_text(encoding="utf-8").splitlines()
    return [[name, json.dumps(value)] for name, value in json.loads(line).items()]


@example
def bin_blocks(page: Json) -> Rows:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder) / "d", "data", block_size=96) as writer:
            for text in ("天", "海" * 4, "天" * 8, "海"):
                writer.write({"<ans>": text})
        for i, (_, offset, payload) in enumerate(BinaryDataset(Path(folder) / "d")):
            end = offset + len(frame(payload))
            cells = [i, len(payload), offset // 96, offset, end]
            rows.append(list(map(str, cells)))
    return rows


@example
def meta_line(page: Json) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder) / "d", "data", block_size=96) as writer:
            for text in ("天", "海" * 4, "天" * 8, "海"):
                writer.write({"<ans>": text})
        return (Path(folder) / "d" / "meta.bin").read_text(encoding="utf-8").splitlines()


@example
def refused_pickles(page: Json) -> Rows:
    rows = []
    for name, payload in {
        "a dictionary of strings": encode({"<ans>": "天"}),
        "names the class builtins.print": b"cbuiltins\nprint\n(S'hello'\ntR.",
        "ends before its STOP": encode({"<ans>": "天"})[:-1],
        "a list": b"].",
    }.items():
        try:
            decode(payload)
            rows.append([name, "read"])
        except InputError:
            rows.append([name, "refused"])
    return rows


@example
def index_arrays(page: Json) -> Rows:
    """Type and values of each array for a dataset of two records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "d"
        with DatasetWriter(folder, "data", block_size=4096) as writer:
            for record in page("row"):
                writer.write(record)
        TokenIndex.of(BinaryDataset(folder), VOCABULARY)
        index = folder / folder_name(VOCABULARY)
        values: dict[str, np.ndarray] = {
            n: np.fromfile(index / n, dtype=dtype) for n, (dtype, _) in ARRAYS.items()
        }
        present = {path.name for path in index.iterdir()}
        assert present == {*ARRAYS, "index.json"}
    return [
        [array, np.dtype(dtype).name, counted, " ".join(map(str, values[array][:8].tolist()))]
        for array, (dtype, counted) in ARRAYS.items()
    ]


@example
def index_folder(page: Json) -> list[str]:
    return [folder_name(VOCABULARY)]


@example
def dataset_checksums(page: Json) -> list[str]:
    """`checksums.json` of the dataset of `bin_blocks`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "d"
        with DatasetWriter(folder, "data", block_size=96) as writer:
            for text in ("天", "海" * 4, "天" * 8, "海"):
                writer.write({"<ans>": text})
        write_checksums(folder, read_meta(folder)[0])
        assert BinaryDataset(folder).fingerprint  # compares them
        return (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()


@example
def index_checksums(page: Json) -> list[str]:
    """The last fields of `index.json` of the dataset of `index_arrays`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "d"
        with DatasetWriter(folder, "data", block_size=4096) as writer:
            for record in page("row"):
                writer.write(record)
        TokenIndex.of(BinaryDataset(folder), VOCABULARY)
        text = (folder / folder_name(VOCABULARY) / "index.json").read_text(encoding="utf-8")
    lists = json.loads(text)["checksums"]
    assert list(lists) == list(ARRAYS)
    return [f"{array}: {lists[array]}" for array in ("lengths", "ids")]
