"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# On a busy machine, threads that spin while they wait take the core from those that work. The
# variable is read when torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Messages are compared in English, whoever runs the tests.
os.environ["LC_ALL"] = "C.UTF-8"

import properties
import pytest
import support

from cpm_bee.tokenizer import REQUIRED, Tokenizer

properties.load_profile()
_time_limit = properties.TimeLimit()


@pytest.hookimpl(tryfirst=True)  # hypothesis reads the seed in the same hook
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed") is None:
        config.option.hypothesis_seed = properties.new_seed()


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("hypothesis_seed")
    again = "" if seed is None else f", repeat with --hypothesis-seed={seed}"
    return f"property tests: profile {properties.PROFILE}{again}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limited = set()
    for item in items:
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        if handle is None:
            continue
        item.add_marker(pytest.mark.property)
        if id(handle) not in limited:  # the cases of a test share it
            limited.add(id(handle))
            handle.inner_test = _time_limit.apply(handle.inner_test)
    # Processes that share the files begin with the long ones, so that they end at the same time.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    _time_limit.begin()
    return (yield)


@pytest.fixture(scope="session")
def root() -> Path:
    return support.ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    if not support.SHARED.is_dir():
        pytest.skip("../shared is not here")
    return support.SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    if not (shared / "golden").is_dir():
        pytest.skip("../shared/golden is not here")
    return shared / "golden"


@pytest.fixture(scope="session")
def vocabulary(shared: Path) -> Tokenizer:
    """The vocabulary of the released models."""
    path = shared / "vocab" / "bee.txt"
    if not path.is_file():
        pytest.skip("../shared/vocab/bee.txt is not here")
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def small_vocabulary() -> Tokenizer:
    """Overlapping entries, so that greedy matching matters; some have a literal `<`."""
    entries = ["a", "b", "ab", "abc", "bcd", "d", "<", " <", " a", "春", "春天", "天", "<x", "x>"]
    return Tokenizer([*REQUIRED, "<mask>", "<option>", *entries], source="small vocabulary")


@pytest.fixture(scope="session")
def run_script() -> support.RunScript:
    return support.run_script
