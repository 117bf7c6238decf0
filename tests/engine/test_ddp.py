"""How gradients are grouped to be summed; that the sums are right is in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cpm_bee.engine import ddp
from cpm_bee.engine.ddp import DDPStrategy


def test_gradients_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "BUCKET", 4 * 10)
    sent: list[int] = []
    pointers: set[int] = set()

    def double(values: torch.Tensor) -> None:
        sent.append(values.numel())
        pointers.add(values.data_ptr())
        values.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", double)
    sizes = ((4,), (2, 3), (1,), (30,), (2, 2), (5, 5))
    gradients = [torch.randn(size) for size in sizes]
    gradients[-1] = gradients[-1].mT  # not contiguous, so that it needs a copy
    expected = [2 * g for g in gradients]
    large = gradients[3].data_ptr()
    DDPStrategy(torch.device("cpu"), 2).sum_gradients(gradients)
    assert sent == [10, 1, 30, 4, 25]
    assert large in pointers  # summed in place, without a copy
    for gradient, value in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, value)
