"""The time limit of property tests, and that no test has settings that go round its profile."""

from __future__ import annotations

import re

import properties
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT


def limited(seconds: float, *, failing: bool) -> list[int]:
    """Each example takes a second; which ones were run."""
    now, run = 0.0, []
    limit = properties.TimeLimit(seconds, clock=lambda: now)

    @settings(max_examples=50, database=None)
    @given(st.integers())
    def check(value: int) -> None:
        nonlocal now
        now += 1
        run.append(value)
        assert not failing or len(run) < 3

    check.hypothesis.inner_test = limit.apply(check.hypothesis.inner_test)  # type: ignore[attr-defined]
    limit.begin()
    check()
    return run


def test_no_example_begins_after_the_time_is_used_up() -> None:
    assert len(limited(9.5, failing=False)) == 10
    assert len(limited(1000, failing=False)) == 50


def test_a_failure_is_not_hidden_by_the_limit() -> None:
    with pytest.raises(AssertionError):
        limited(2.5, failing=True)


def test_settings_are_those_of_the_profile() -> None:
    assert settings.default is not None and settings.default.deadline is None
    if properties.PROFILE == "ci":
        assert settings.default.derandomize
        names = {phase.name for phase in settings.default.phases}
        assert "shrink" not in names and "generate" in names
    own = [
        path.name
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@settings\(|= settings\(", path.read_text(encoding="utf-8"), re.M)
    ]
    assert own == []  # properties.examples keeps to the profile
