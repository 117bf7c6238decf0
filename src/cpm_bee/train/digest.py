"""A digest of the trained tensors, by which runs are compared bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from cpm_bee.model.network import CPMBee

# Steps after which the log gets a digest, besides the last one.
DIGEST_STEPS = (0, 1, 2, 5, 10, 20, 50, 100)
# Gathering and hashing more values would take a second each time. A delta of a 10B model has some
# millions; full fine-tuning of a large model goes without digests.
_MOST = 1 << 26


def has_digests(model: CPMBee) -> bool:
    """Whether there are few enough trained values; to be asked before the model is sharded."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) <= _MOST


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of names, types, shapes and all values of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
