"""One of the processes of the step `nccl`, under torchrun:

torchrun ... -m cpm_bee.doctor.ranks DEVICE FILE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from cpm_bee.engine.torch_engine import TorchEngine

_VALUES = 1_000_000
_ROUNDS = 3


def main(device: str, file: str) -> None:
    engine = TorchEngine(torch.device(device), torch.float32)
    ranks = range(engine.world_size)
    right = engine.reduce([engine.rank + 1.0]) == [sum(r + 1.0 for r in ranks)]
    right &= engine.reduce_max([engine.rank]) == [engine.world_size - 1]
    values = [float(engine.rank)] * _VALUES
    engine.barrier()
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        total = engine.reduce(values)
    seconds = (time.perf_counter() - begin) / _ROUNDS
    right &= total == [float(sum(ranks))] * _VALUES
    if engine.rank == 0:
        text = f"{engine.world_size} processes, {8 * _VALUES / 1e6:.0f} MB in {seconds:.2f} s"
        backend = "nccl" if engine.device.type == "cuda" else "gloo"
        found = {"right": right, "backend": backend, "text": text}
        Path(file).write_text(json.dumps(found), encoding="utf-8")
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
