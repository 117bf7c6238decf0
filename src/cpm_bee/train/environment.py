"""What a run depends on besides its inputs: the machine, the packages and the code."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpm_bee
from cpm_bee.engine import Engine
from cpm_bee.model.network import CPMBee

PACKAGE = Path(cpm_bee.__file__).resolve().parent
# Variables that change which kernels run, and so how results are rounded.
VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)
_GIT_SECONDS = 10


def environment_of(engine: Engine, model: CPMBee) -> dict[str, Any]:
    """Returns what the results of a run may depend on, as JSON values."""
    cuda = engine.device.type == "cuda"
    return {
        "cpm_bee": cpm_bee.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": engine.device.type,
        "gpu": torch.cuda.get_device_name(engine.device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "engine": engine.name,
        "ranks": engine.world_size,
        "sharded": engine.lockstep,
        "checkpointing": any(layer.checkpointing for layer in model.encoder.layers),
        "attention": model.attention,
    }


def _cpu() -> str:
    """The name of the CPU; that of its kind where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_of() -> dict[str, Any]:
    """Returns the version of the code: of its source, and the commit if it is in a repository."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    # An installed package may lie below a repository of something else.
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    changes = _git("status", "--porcelain", "--", ".") if is_tracked else None
    return {
        "source": digest.hexdigest(),
        "commit": _git("rev-parse", "HEAD") if is_tracked else None,
        "changed": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    """What git prints in the folder of the package; None if it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
