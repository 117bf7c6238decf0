"""`--verify`: whole files compared with checksums, and files that have none."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpm_bee.checkpoint.reader import Checkpoint, load_tensors
from cpm_bee.errors import DamagedFile

TENSORS = {f"encoder.{i}": torch.randn(40, 30) for i in range(3)}


@pytest.fixture(autouse=True)
def all_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cpm_bee")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def flip_in_last_tensor(path: Path) -> None:
    flip(path, path.read_bytes().rindex(TENSORS["encoder.2"].numpy().tobytes()) + 1001)


def test_a_changed_tensor_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.bin"
    torch.save(TENSORS, path)
    Checkpoint(path, verify=True)
    assert f"{path}: verified, by its CRC-32" in caplog.text
    flip_in_last_tensor(path)
    assert len(Checkpoint(path).entries) == 3  # a large file is not read as a whole unasked
    with pytest.raises(DamagedFile, match=r"a\.bin: damaged: encoder\.2 has changed"):
        Checkpoint(path, verify=True)


def test_every_shard_is_verified(tmp_path: Path) -> None:
    for i, name in enumerate(TENSORS, 1):
        torch.save({name: TENSORS[name]}, tmp_path / f"pytorch_model-0000{i}-of-00003.bin")
    Checkpoint(tmp_path, verify=True)
    flip_in_last_tensor(tmp_path / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(DamagedFile, match=r"00003-of-00003\.bin: damaged"):
        Checkpoint(tmp_path, verify=True)


@pytest.mark.parametrize("place", ["sha256sum", "client", "link"])
def test_the_sha256_of_a_release(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if place == "sha256sum":
        (tmp_path / "model.safetensors.sha256").write_text(f"{digest.upper()}  {path.name}\n")
    elif place == "client":
        note = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    else:
        (tmp_path / "blobs").mkdir()
        path.rename(tmp_path / "blobs" / digest)
        path.symlink_to(tmp_path / "blobs" / digest)
    Checkpoint(path, verify=True)
    assert "verified, by the SHA-256" in caplog.text
    flip(path, path.stat().st_size - 100)
    Checkpoint(path)
    with pytest.raises(DamagedFile, match=rf"that of the release is {digest}"):
        Checkpoint(path, verify=True)


@pytest.mark.parametrize("kind", ["safetensors", "before torch 1.6", "without checksums"])
def test_files_without_checksums_are_named_and_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.bin")
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "before torch 1.6":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(TENSORS, path)
        finally:
            torch.serialization.set_crc32_options(True)
        assert {entry.CRC for entry in zipfile.ZipFile(path).infolist()} == {0}
        assert len(load_tensors(path, "a delta file", verify=True)) == 3
    entries = Checkpoint(path, verify=True).entries
    assert all(torch.equal(entries[name].read(), TENSORS[name]) for name in TENSORS)
    assert f"{path}: has not been verified" in caplog.text


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    """Each names the same bytes: reading them all would take time without end."""
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
        (entry,) = archive.infolist()
        archive.filelist += [entry] * 50
    with pytest.raises(DamagedFile, match="overlap"):
        load_tensors(path, "a training state", verify=True)
