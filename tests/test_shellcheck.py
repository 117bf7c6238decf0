"""All shell scripts against shellcheck, where it is installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from support import ROOT

SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])


def test_the_scripts_are_found() -> None:
    assert {"venv.sh", "finetune_cpm_bee.sh", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: object) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    # Sourced files are looked for beside the script that sources them.
    command = [program, "--external-sources", "--source-path=SCRIPTDIR", str(script)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout
