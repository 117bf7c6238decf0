"""Lets an action in this process end between two operations on the disk, as a kill would end it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

OPERATIONS = ("rename", "replace", "link", "mkdir", "rmdir", "unlink")


class Killed(BaseException):
    pass


def killed_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """The process dies at the first operation on the disk after so many of them."""
    done = 0

    def dying(original: Any) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal done
            if done == count:
                raise Killed
            done += 1
            return original(*args, **options)

        return operation

    for name in OPERATIONS:
        patch.setattr(os, name, dying(getattr(os, name)))


def is_killed(patch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> bool:
    """Run an action that dies after so many operations; returns false if it needs fewer."""
    with patch.context() as inner:
        killed_after(inner, count)
        try:
            act()
        except Killed:
            return True
    return False
