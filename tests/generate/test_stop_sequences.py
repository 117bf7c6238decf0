"""Stop sequences as text: where an answer ends, and what of it may be shown before its end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.generate.stop_sequences import NO_STOPS, StopSequences


@pytest.mark.parametrize(
    ("stops", "escaped", "plain", "so_far"),
    [
        ((), "a<<b", "a<b", "a<b"),
        (("b",), "aab", "aa", "aa"),
        (("bc",), "aab", "aab", "aa"),
        (("bc", "a"), "xabc", "x", "x"),
        (("bcb",), "abcbcb", "a", "a"),
        (("abac",), "ababa", "ababa", "ab"),
        (("a<b",), "xa<<", "xa<", "x"),
        (("a<b",), "xa<<b", "x", "x"),
        (("春风",), "天春", "天春", "天"),
    ],
)
def test_examples(stops: tuple[str, ...], escaped: str, plain: str, so_far: str) -> None:
    own = StopSequences(stops)
    assert own.plain(escaped) == plain
    assert own.plain_so_far(escaped) == so_far


_TEXT = st.text("ab", max_size=12)


@pytest.mark.property
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(_TEXT, max_size=6))
def test_what_was_shown_is_never_taken_back(stops: list[str], parts: list[str]) -> None:
    """What is shown grows, whatever follows, and what it grows to is the answer."""
    own = StopSequences(tuple(stops))
    text = shown = ""
    for part in parts:
        text += part
        grown = own.plain_so_far(text)
        assert grown.startswith(shown)
        shown = grown
        if own.end_of(text) is not None:
            break
    answer = own.plain(text)
    assert answer.startswith(shown)
    assert not any(stop in answer for stop in stops)
    # All is shown but what may begin a sequence.
    assert len(answer) - len(shown) < max(own.longest, 1)


def test_no_stops() -> None:
    assert NO_STOPS.longest == 0 and NO_STOPS.end_of("a") is None
