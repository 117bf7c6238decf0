"""How the golden numbers were made: weights by seed and name, and what counts as equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# Largest difference, as a share of the largest value of the array. Both sides compute in fp32 in
# different order; on CPUs the most that any array differs by is 2.2e-6 with AVX-512, 2.3e-6 with
# AVX2 and 2.7e-6 with neither (see CONTRIBUTING.md, Tests).
TOLERANCE = 5e-6


def weight(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    w = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    if "layernorm" in name:
        return 1 + 0.1 * w
    if name.endswith("lora_A"):
        return 0.1 * w
    return 0.05 * w if name.endswith("lora_B") else w


@torch.no_grad()
def fill_weights(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weight(seed, name, tuple(parameter.shape)))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_equal(actual: Any, expected: Any, what: str) -> None:
    """Equal up to `TOLERANCE`; shapes must be the same."""
    a = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, np.float64)
    e = np.asarray(expected, np.float64)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    difference = float(np.abs(a - e).max() / np.abs(e).max())
    assert difference <= TOLERANCE, f"{what}: differs by {difference:.1e}"
