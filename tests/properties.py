"""How property tests run: hypothesis profiles, and a bound on the time of each test.

    pytest                                    profile ci: the same examples every time, no shrinking
    HYPOTHESIS_PROFILE=fuzz pytest -m property    random, many more, shrinks what fails

Hypothesis limits the time of an example (a deadline), not that of a test. A deadline fails on a
busy machine, so there is none; instead, no further example runs once a test's time is used up.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
# On a busy machine, examples take long to make, which is not the test's fault.
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
_MORE = 20  # times as many examples for fuzzing
_SECONDS = {"ci": 20.0, "fuzz": 60.0}

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    max_examples=100,
    **_COMMON,
)
settings.register_profile(
    "fuzz", derandomize=False, print_blob=True, max_examples=100 * _MORE, **_COMMON
)


def load_profile() -> None:
    if PROFILE not in _SECONDS:
        raise ValueError(f"HYPOTHESIS_PROFILE={PROFILE}: expected one of {', '.join(_SECONDS)}")
    settings.load_profile(PROFILE)


def examples(count: int, *suppress: HealthCheck, **rest: Any) -> settings:
    """Returns settings for a test with slow examples: at most `count`, or more for fuzzing."""
    default = settings.default
    assert default is not None
    return settings(
        max_examples=count * (_MORE if PROFILE == "fuzz" else 1),
        suppress_health_check=[*default.suppress_health_check, *suppress],
        **rest,
    )


def new_seed() -> str | None:
    """Returns a seed to print for the random profile; None for the other."""
    return str(random.SystemRandom().randrange(2**32)) if PROFILE == "fuzz" else None


class TimeLimit:
    """Ends property tests early. A failure is repeated however long it takes."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self._seconds = _SECONDS[PROFILE] if seconds is None else seconds
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A test begins."""
        self._began = self._clock()
        self._has_failed = False

    def apply(self, test: Callable[..., None]) -> Callable[..., None]:
        """Returns the function that hypothesis calls for each example, with the limit."""

        @functools.wraps(test)
        def limited(*args: Any, **kwargs: Any) -> None:
            if not self._has_failed and self._clock() - self._began > self._seconds:
                return
            try:
                test(*args, **kwargs)
            except Exception:
                self._has_failed = True
                raise

        return limited
