from __future__ import annotations

import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cpm_bee import checksums
from cpm_bee.checksums import BLOCK, CheckedBlocks
from cpm_bee.errors import DamagedFile

SIZE = 5 * BLOCK + 1234


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def opened(path: Path, lists: list[int]) -> CheckedBlocks:
    return CheckedBlocks(path, path.stat().st_size, lists, "make it again")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


def test_the_checksums_of_blocks(path: Path) -> None:
    content = path.read_bytes()
    expected = [zlib.crc32(content[i : i + BLOCK]) for i in range(0, SIZE, BLOCK)]
    assert checksums.of_blocks(path) == expected and len(expected) == 6
    path.write_bytes(b"")
    assert checksums.of_blocks(path) == []


def test_only_the_blocks_that_are_used_are_compared(path: Path) -> None:
    lists = checksums.of_blocks(path)
    flip(path, 2 * BLOCK + 5)
    blocks = opened(path, lists)
    blocks.check(0, 2 * BLOCK)
    blocks.check(3 * BLOCK, SIZE)
    blocks.check(2 * BLOCK, 2 * BLOCK)  # no bytes
    for begin, end in ((0, 2 * BLOCK + 1), (3 * BLOCK - 1, 3 * BLOCK), (0, SIZE)):
        with pytest.raises(DamagedFile) as caught:
            blocks.check(begin, end)
        told = f"{path}: bytes {2 * BLOCK} to {3 * BLOCK - 1} have changed since they were written"
        assert str(caught.value) == f"{told} (checksum)\nmake it again"


def test_a_block_is_compared_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = opened(path, checksums.of_blocks(path))
    compared: list[int] = []
    compare = CheckedBlocks._compare

    def count(self: CheckedBlocks, block: int) -> None:
        compared.append(block)
        compare(self, block)

    monkeypatch.setattr(CheckedBlocks, "_compare", count)
    blocks.check(BLOCK, BLOCK + 1)
    blocks.check(0, SIZE)
    blocks.check(0, SIZE)
    assert compared == [1, 0, 2, 3, 4, 5]
    assert blocks.num_unused == 0 and not any(blocks.unused)


def test_a_list_of_another_length_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="not a checksum for each block"):
        opened(path, checksums.of_blocks(path)[:-1])


def test_a_seal_covers_names_and_values() -> None:
    values = {"a": [1, 2], "b": {"c": "x"}}
    sealed = checksums.sealed(values)
    assert checksums.is_intact(sealed)
    assert sealed == {**values, "crc32": zlib.crc32(b'{"a": [1, 2], "b": {"c": "x"}}')}
    for changed in (
        {**sealed, "a": [1, 3]},
        {**sealed, "d": 1},
        {**sealed, "crc32": sealed["crc32"] ^ 1},
        values,
    ):
        assert not checksums.is_intact(changed)


def test_threads_count_each_block_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = opened(path, checksums.of_blocks(path))
    read = os.pread

    def slowly(*place: int) -> bytes:
        time.sleep(0.001)  # another thread goes on
        return read(*place)

    monkeypatch.setattr(checksums.os, "pread", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: blocks.check(0, SIZE), range(64)))
    assert blocks.num_unused == 0 and not any(blocks.unused)
