"""The JSON file beside weights: written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_bee.checkpoint.sidecar import read_sidecar, sidecar_path, write_sidecar
from cpm_bee.errors import InputError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    weights = tmp_path / "run-best.pt"
    assert read_sidecar(weights) == {}
    write_sidecar(weights, {"alpha": 16, "targets": ["w_0"]})
    assert read_sidecar(weights).pop("written_by").startswith("cpm_bee ")
    assert {"alpha": 16, "targets": ["w_0"]}.items() <= read_sidecar(weights).items()
    assert [path.name for path in tmp_path.iterdir()] == ["run-best.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"alpha": 16', "not a JSON file"),
        ("[1]", "a JSON object is expected"),
        ('"text"', "a JSON object is expected"),
        ("", "not a JSON file"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        (f'{{"alpha": 1{"0" * 400}}}', "a number of 401 digits is too large"),
        (f'{{"alpha": 1{"0" * 9000}}}', "not a JSON file"),
        ('{"alpha": 1e999}', "1e999 is not a finite number"),
        ('{"alpha": NaN}', "NaN is not a finite number"),
        ('{"alpha": -Infinity}', "-Infinity is not a finite number"),
    ],
)
def test_what_is_not_a_sidecar_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    weights = tmp_path / "run-best.pt"
    sidecar_path(weights).write_text(text)
    with pytest.raises(InputError) as caught:
        read_sidecar(weights)
    first, remedy = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'run-best.json'}: ") and reason in first
    assert "restore it, or move it elsewhere (mv " in remedy


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run-best.json").write_bytes(b"{\xff\xfe")
    with pytest.raises(InputError, match=r"run-best\.json: not a JSON file"):
        read_sidecar(tmp_path / "run-best.pt")


def test_other_files_of_a_checkpoint_are_no_sidecar(tmp_path: Path) -> None:
    """Neither an index of shards, whose name would be its own sidecar's, nor the model's config."""
    for name in ("pytorch_model.bin.index.json", "config.json"):
        (tmp_path / name).write_text("{ broken")
    assert read_sidecar(tmp_path / "pytorch_model.bin.index.json") == {}
    assert read_sidecar(tmp_path / "config.bin") == {}
    assert read_sidecar(tmp_path / "pytorch_model.bin") == {}
    (tmp_path / "config.json").write_text(json.dumps({"alpha": 3}))
    assert read_sidecar(tmp_path / "config.bin") == {}
