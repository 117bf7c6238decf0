"""scripts/test.sh: how many processes share the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

SHARED = "-m pytest -n {} --dist loadfile --no-loadscope-reorder"


def asked(place: Path, *arguments: str, cores: int = 2, **settings: str) -> str:
    """The arguments of Python, and the threads of each process, on a machine with some cores."""
    (place / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test.sh", place / "scripts")
    (place / "scripts" / "venv.sh").write_text('project="$PWD"\nmake_venv() { :; }\n')
    (place / "tests").mkdir()
    for name in ("test_a.py", "test_b.py"):
        (place / "tests" / name).write_text("")
    (place / "bin").mkdir()
    # The real nproc heeds OMP_NUM_THREADS too.
    nproc = f"echo ${{OMP_NUM_THREADS:-{cores}}}"
    for name, line in (("nproc", nproc), ("python", 'echo "$@ [$OMP_NUM_THREADS]"')):
        (place / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / "bin" / name).chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if n not in ("OMP_NUM_THREADS", *settings)}
    done = subprocess.run(
        ["bash", "scripts/test.sh", *arguments],
        cwd=place,
        env={**environment, **settings, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "arguments", [(), ("-m", "not slow"), ("tests",), ("tests/test_a.py", "tests/test_b.py::test")]
)
def test_processes_share_the_tests(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert asked(tmp_path, *arguments) == " ".join([SHARED.format(2), *arguments, "[1]"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n", "3"),
        ("-n0",),
        ("-x",),
        ("--maxfail=2",),
        ("tests/test_a.py",),
        ("tests/test_a.py::t",),
    ],
)
def test_other_arguments_go_to_pytest_alone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert asked(tmp_path, *arguments) == " ".join(["-m pytest", *arguments, "[]"])


@pytest.mark.parametrize(
    ("cores", "settings", "expected"),
    [
        (1, {}, "-m pytest []"),
        (16, {}, f"{SHARED.format(4)} [4]"),
        (2, {"TEST_PROCESSES": "1"}, "-m pytest []"),
        (8, {"TEST_PROCESSES": "3"}, f"{SHARED.format(3)} [2]"),
        (2, {"OMP_NUM_THREADS": "2"}, f"{SHARED.format(2)} [2]"),
    ],
)
def test_their_number_and_threads(
    tmp_path: Path, cores: int, settings: dict[str, str], expected: str
) -> None:
    assert asked(tmp_path, cores=cores, **settings) == expected


def test_threads_that_are_given_are_kept(tmp_path: Path) -> None:
    assert asked(tmp_path, OMP_NUM_THREADS="1") == f"{SHARED.format(2)} [1]"
