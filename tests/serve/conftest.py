"""A server that all tests share, on a small random model whose answers are long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import make_base
from serve_support import Served, serving

LIMITS = ("--max-answer-tokens", 2000, "--max-prompt-tokens", 200, "--max-body", 20_000)
LIMITS += ("--max-length", 30, "--max-beams", 8, "--max-records", 6)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("serve") / "small-model"
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), "--load", base, *LIMITS) as started:
        yield started
        assert started.process.poll() is None, started.log.read_text(encoding="utf-8")
        assert "Traceback" not in started.log.read_text(encoding="utf-8")
