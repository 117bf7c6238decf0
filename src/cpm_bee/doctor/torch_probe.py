"""Prints what PyTorch says about this machine as JSON:   python -m cpm_bee.doctor.torch_probe

A process of its own, because a broken driver or library can crash or hang it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any


def facts() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "arch_list": torch.cuda.get_arch_list() if torch.version.cuda else [],
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["cuda_available"] = torch.cuda.is_available()
    found["warnings"] = [str(w.message).splitlines()[0] for w in caught]
    if found["cuda_available"]:
        found["cudnn"] = torch.backends.cudnn.version()
        with contextlib.suppress(AttributeError):  # a build without NCCL
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["devices"] = [_device(torch, i) for i in range(torch.cuda.device_count())]
    return found


def _device(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)  # makes a context: the real test of the driver
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total": total,
        "free": free,
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
