"""Sharding (FSDP2) on two processes; that it trains as one does is in test_distributed.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharding_runs
import tiny
import train_support
from support import ROOT


@pytest.mark.slow
def test_each_process_reads_and_keeps_its_part(tmp_path: Path) -> None:
    for name, config in (("large", sharding_runs.LARGE), ("small", tiny.make_config())):
        sharding_runs.write_model(tmp_path / name, config)
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
    script = ROOT / "tests" / "sharding_runs.py"
    command = train_support.command(str(tmp_path), ranks=2, script=script)
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    process = train_support.start(command, tmp_path, PYTHONPATH=path, TMPDIR=str(tmp_path))
    status, output, errors = train_support.finish(process)
    assert status == 0, errors
    assert "all checks passed" in output
