"""Runs one step in this process and writes its lines to a file.

    python -m cpm_bee.doctor.child MODULE:FUNCTION DEVICE FOLDER

`runner.py` starts it. Whatever happens to this process, a crash in a kernel or a hang, is seen from
outside and ends one step only.
"""

from __future__ import annotations

import cpm_bee.cli  # noqa: F401  # sets OMP_WAIT_POLICY, before torch is loaded  # isort: skip

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cpm_bee.doctor.bounds import Line, judge_exact
from cpm_bee.doctor.report import NEEDS_CUDA, NOT_AVAILABLE
from cpm_bee.engine.device import choose_device
from cpm_bee.engine.torch_engine import TorchEngine

RESULT = "result.json"


@dataclass
class Context:
    """What a step gets: a device, and a folder for its files. It adds lines as it goes."""

    device: torch.device
    folder: Path
    lines: list[Line] = field(default_factory=list)
    on_change: Callable[[], None] = lambda: None

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def add(self, *lines: Line) -> None:
        self.lines += lines
        self.on_change()

    def check(self, what: str, is_right: bool, text: str) -> None:
        """Add a line that is either right or a fault."""
        self.add(judge_exact(what, is_right, text))

    def needs_cuda(self, what: str) -> None:
        self.add(Line(what, NEEDS_CUDA, "not run on a CPU"))

    def not_available(self, what: str, reason: str) -> None:
        self.add(Line(what, NOT_AVAILABLE, reason))


def main(function: str, device: str, folder: str) -> None:
    result = Path(folder, RESULT)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    TorchEngine(chosen, torch.float32)  # sets up PyTorch as a run does
    context = Context(chosen, Path(folder))

    def save() -> None:
        result.write_text(json.dumps([line._asdict() for line in context.lines]), encoding="utf-8")

    context.on_change = save
    torch.manual_seed(0)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(context)
    save()


if __name__ == "__main__":
    main(*sys.argv[1:])
