"""One flipped bit in any file with checksums is named, and never loaded as other values.

For more, with other seeds:    HYPOTHESIS_PROFILE=fuzz python -m pytest tests/test_bit_flips.py
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from bit_flips import KINDS, is_equal
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from properties import examples


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_named(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    intact = kind.load()
    assert is_equal(kind.load(), intact)
    counts: Counter[str] = Counter()

    @examples(15 if kind.makes else 100, HealthCheck.function_scoped_fixture)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        flip = kind.draw(random.Random(seed))
        outcome = kind.outcome(flip, intact)
        assert outcome != "silent", f"{flip.path.name}, bit {flip.bit}"
        counts[outcome] += 1

    check()
    # What is made again is always equal.
    assert kind.makes or counts["refused"] + counts["replaced"] > counts.total() / 2, counts
