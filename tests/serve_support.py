"""Servers in processes of their own, and what tests ask them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import httpx
import openai
from support import ROOT

TINY_BASE = ROOT / "src" / "ckpts" / "cpm-bee-tiny"


@dataclass
class Served:
    """A running server.

    Attributes:
        log: what it writes to standard error.
    """

    url: str
    process: subprocess.Popen[str]
    log: Path
    key: str = "none"

    def openai(self, **changes: Any) -> openai.OpenAI:
        settings: dict[str, Any] = {"max_retries": 0, "timeout": 60, "api_key": self.key}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**settings, **changes})

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def figure(self, name: str, **labels: str) -> float:
        """A figure of /metrics, which is there."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        for line in text.splitlines():
            given, _, value = line.rpartition(" ")
            if re.match(rf"{name}\b", given) and all(
                f'{k}="{v}"' in given for k, v in labels.items()
            ):
                return float(value)
        raise AssertionError(f"no {name} {labels} in\n{text}")

    def wait_for(self, name: str, value: float, seconds: float = 20, **labels: str) -> None:
        """Wait until a figure has a value."""
        end = time.monotonic() + seconds
        while (found := self.figure(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def memory(self) -> int:
        """The resident bytes of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        [kilobytes] = re.findall(r"VmRSS:\s*(\d+) kB", status)
        return int(kilobytes) * 1024

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, *flags: object, **environment: str) -> Iterator[Served]:
    """Start serve.py on a free port, and end it.

    Args:
        folder: for its log.
    """
    log = folder / "serve.log"
    command = [sys.executable, str(ROOT / "src" / "serve.py"), "--port", "0", *map(str, flags)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with open(log, "w", encoding="utf-8") as errors:
        process = forked.Popen(
            command,
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"{line}\n{log.read_text(encoding='utf-8')}"
        key = environment.get("CPM_BEE_API_KEY", "none")
        yield Served(found[0], process, log, key)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
