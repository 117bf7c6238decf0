"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import support

from cpm_bee.tokenizer import REQUIRED, Tokenizer


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
