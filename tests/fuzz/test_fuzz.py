"""The readers against mutated files; the harness against readers that have faults."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import forked
import pytest
import support
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.errors import InputError
from cpm_bee.train.saved_state import _PROGRESS
from cpm_bee.train.training_state import TrainingState
from fuzz import run
from fuzz.targets import EXPECTED, Target, make_targets

SECONDS = 120


def fuzz_command(*arguments: object, timeout: float) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(support.ROOT / name) for name in ("src", "tests"))
    return forked.run(
        [sys.executable, "-m", "fuzz.run", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


@pytest.mark.slow
def test_20000_inputs_end_in_a_result_or_an_error_of_our_own(tmp_path: Path) -> None:
    """The same inputs every time; `make fuzz` tries others."""
    status = tmp_path / "status"
    done = fuzz_command("--inputs", 20_000, "--seed", 15, "--status", status, timeout=4 * SECONDS)
    last = status.read_text() if status.exists() else "nothing"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nended at {last}"
    counts = [line.split() for line in done.stdout.splitlines() if line.endswith(" 0 faults")]
    assert sum(int(words[1].replace(",", "")) for words in counts) >= 20_000


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in make_targets(tmp_path_factory.mktemp("fuzz"))}


NAMES = ["raw", "records", "texts", "meta", "data", "payloads", "index", "checkpoint"]
NAMES += [
    "safetensors",
    "shards",
    "sidecar",
    "config",
    "vocabulary",
    "delta",
    "adapter",
    "delta-sidecar",
]
NAMES += ["state", "quantized", "settings", "receipt"]


def test_all_targets_are_named(targets: dict[str, Target]) -> None:
    assert list(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
@given(content=st.binary(max_size=200))
@examples(10)
def test_any_bytes(name: str, targets: dict[str, Target], content: bytes) -> None:
    try:
        targets[name].read([content])
    except EXPECTED as error:
        assert str(error)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32))
@examples(10)
def test_any_mutation(name: str, targets: dict[str, Target], seed: int) -> None:
    target = targets[name]
    try:
        target.read([target.make(random.Random(seed))])
    except EXPECTED as error:
        assert str(error)


# ------------------------------------------------------------------ the harness


def loop(_: list[bytes]) -> None:
    try:
        while True:
            pass
    except Exception:
        pass


def take_memory(_: list[bytes]) -> None:
    bytearray(300 << 20)


def fail(inputs: list[bytes]) -> None:
    if b"bad" in inputs:
        raise KeyError("a")


def refuse(_: list[bytes]) -> None:
    raise InputError("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (fail, "KeyError"),
        (loop, "took more than 2 seconds"),
        (take_memory, "MiB for"),
        (refuse, None),
        (len, None),
    ],
)
def test_faults_are_found(
    read: Callable[[list[bytes]], None], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SECONDS", 2.0)
    target = Target("name", lambda rng: b"bad", read, 1, batch=3)
    found = run.find_fault(target, [b"good", b"bad", b"good"])
    if fault is None:
        assert found is None
    else:
        assert found is not None and fault in found
        assert ("input b'bad'" in found) == (read is fail)


def test_a_seed_gives_the_same_inputs(targets: dict[str, Target]) -> None:
    for target in targets.values():
        first, second = (target.make(random.Random("7:a:1")) for _ in range(2))
        assert first == second, target.name


@pytest.mark.slow
def test_a_batch_can_be_repeated() -> None:
    done = fuzz_command("--target", "meta", "--seed", 3, "--batch", 5, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "0 faults" in done.stdout


def test_the_parts_of_a_state_are_those_of_the_trainer() -> None:
    assert {field.name for field in fields(TrainingState)} == set(_PROGRESS)
