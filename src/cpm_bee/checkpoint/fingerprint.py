"""The fingerprint of a model's weights, whatever file they are in (docs/format.md §6)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch

SAMPLED = 256  # values at each end of a tensor that go into a fingerprint


def fingerprint(tensors: Mapping[str, Callable[[], torch.Tensor]]) -> str:
    """The SHA-256 of names, shapes and the first and last 256 values (as fp16) of each tensor."""
    return fingerprint_of(sample(name, read()) for name, read in tensors.items())


def sample(name: str, tensor: torch.Tensor) -> tuple[str, bytes]:
    """A tensor's name and the bytes that a fingerprint takes from it."""
    flat = tensor.detach().reshape(-1)
    ends = torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).float().cpu().half()
    return name, f"{name} {list(tensor.shape)} ".encode() + ends.numpy().tobytes()


def fingerprint_of(samples: Iterable[tuple[str, bytes]]) -> str:
    """The `fingerprint` of tensors from their samples, in any order."""
    digest = hashlib.sha256()
    for _, taken in sorted(samples):
        digest.update(taken)
    return digest.hexdigest()
