"""What the doctor reads from a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_bee.doctor import facts


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),  # control groups v2
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),  # v1
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    cores, reason = facts.usable_cores(tmp_path)
    if expected is None:
        assert cores == len(os.sched_getaffinity(0))
    else:
        assert cores == expected and "quota" in reason


def test_disk(tmp_path: Path) -> None:
    found = facts._disk(tmp_path / "not" / "yet" / "made")
    assert found["free"] > 0 and found["error"] == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "is a file" in facts._disk(tmp_path / "file")["error"]
    assert facts._disk(Path("/proc/1/results"))["error"] != ""


def test_commands_that_hang_or_fail() -> None:
    python = [sys.executable, "-c"]
    assert facts._run([*python, "print(1)"], 20) == ("1\n", "")
    assert facts._run([*python, "import time; time.sleep(60)"], 0.5) == (
        "",
        "did not answer within 0 seconds",
    )
    _, error = facts._run([*python, "raise OSError('libcudart.so.12: not found')"], 20)
    assert error == "OSError: libcudart.so.12: not found (ended with status 1)"
    _, error = facts._run([*python, "import os; os.kill(os.getpid(), 11)"], 20)
    assert error == "no message (ended with signal 11)"
    assert facts._run(["/nothing/here"], 1)[1] == "No such file or directory"


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a script that answers as nvidia-smi does."""
    smi = tmp_path / "nvidia-smi"
    line = "NVIDIA H100 PCIe, 580.95.05, 81559, 4, Default, [N/A]"
    smi.write_text(f"#!/bin/sh\necho '{line}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (card,), error = facts._nvidia_smi()
    assert error == "" and card["memory.used"] == "4" and card["driver_version"] == "580.95.05"
    smi.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    assert facts._nvidia_smi() == ([], "Driver/library version mismatch (ended with status 18)")


def test_libraries_that_shadow(tmp_path: Path) -> None:
    (tmp_path / "libcudnn_ops.so.8").write_text("")
    (tmp_path / "libm.so.6").write_text("")
    assert facts._shadowing(f"/nothing:{tmp_path}:") == [str(tmp_path / "libcudnn_ops.so.8")]


def test_windows_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts._crlf_scripts() == ()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "a.sh").write_bytes(b"#!/bin/sh\r\necho\r\n")
    (tmp_path / "scripts" / "b.sh").write_bytes(b"#!/bin/sh\necho\n")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert facts._crlf_scripts() == ("scripts/a.sh",)


def test_the_probe_of_torch() -> None:
    found, error = facts._probe_torch()
    version = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        encoding="utf-8",
    )
    assert error == "" and found["version"] == version.stdout.strip()
    assert found["threads"] >= 1
