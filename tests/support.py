"""Paths, and how tests run a script; fixtures are in conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    script: str, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository as a user would, in the folder `cwd`."""
    return forked.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
