"""Step `prefetch` of `doctor.py --gpu`: batches copied in the background are the same, bit for bit.

On a GPU the copies run on a stream of their own, while kernels of the step before still read the
batch before. A missing wait would show as other bits now and then, so there are many batches, and
long kernels between them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cpm_bee.data.batch import Batch
from cpm_bee.doctor.bounds import judge_equal
from cpm_bee.doctor.child import Context
from cpm_bee.doctor.workload import batch_of, records
from cpm_bee.train import prefetch

_ROUNDS = 5


def prefetching(context: Context) -> None:
    batches = [batch_of(records(24, seed)) for seed in range(8)]
    plain = [{n: t.clone() for n, t in batch.tensors().items()} for batch in batches]
    for number in range(1 if context.on_cpu else _ROUNDS):
        found = list(_read_while_computing(context, batches))
        for i, (tensors, expected) in enumerate(zip(found, plain, strict=True)):
            line = judge_equal(f"round {number}, batch {i}", tensors, expected)
            if i == len(plain) - 1 or line.verdict != "ok":
                context.add(line)
    if context.on_cpu:
        context.needs_cuda("page-locked memory and streams")


def _read_while_computing(
    context: Context, batches: list[Batch]
) -> Iterator[dict[str, torch.Tensor]]:
    size = 64 if context.on_cpu else 4096
    matrix = torch.ones(size, size, device=context.device) / size
    steps = prefetch.prefetch(
        iter(range(len(batches))), lambda i: [batches[i]], context.device, background=True
    )
    for _, (batch,) in steps:
        assert batch is not None
        for _ in range(20):  # the stream is busy when the batch is read below
            matrix = matrix @ matrix
        yield {name: tensor.clone() for name, tensor in batch.tensors().items()}
