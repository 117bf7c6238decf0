"""The real bmtrain 1.0.1 on CPUs, over gloo, for tests.

Only what touches CUDA is replaced: bmtrain's modules see a `torch` whose CUDA device is the CPU;
its NCCL calls, which pass pointers, go to gloo; the CUDA kernels that a training step calls are a
line of torch each. The CPU Adam kernels and all Python of bmtrain are its own. This does not test
streams, events, page-locked memory, real NCCL and real kernels (docs/gpu-checklist.md).

    python tests/bmtrain_cpu.py SCRIPT [FLAG ...]

runs a script of the project, alone or under torchrun, with `--engine bmtrain` allowed on a CPU.

`install` cannot be undone: use it in processes that do nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import functools
import importlib.util
import os
import runpy
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
import torch
import torch.distributed as dist

from cpm_bee.distributed import process_group

if TYPE_CHECKING:
    from cpm_bee.engine.bmtrain_engine import BMTrainEngine

_ROOT = Path(__file__).resolve().parent.parent
_CPU = torch.device("cpu")
_TIMEOUT = datetime.timedelta(seconds=60)
_KEPT_ALIVE: list[Any] = []  # rank 0's store must outlive all exchanges

# ncclDataType_t and ncclRedOp_t, from NCCL's documentation.
_TYPES = {
    0: torch.int8, 1: torch.uint8, 2: torch.int32, 4: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 9: torch.bfloat16,
}  # fmt: skip
_OPERATIONS = {0: dist.ReduceOp.SUM, 1: dist.ReduceOp.PRODUCT, 2: dist.ReduceOp.MAX}
_OPERATIONS |= {3: dist.ReduceOp.MIN, 4: dist.ReduceOp.SUM}
_AVERAGE = 4


def require() -> None:
    """Skip a test if bmtrain is not installed."""
    if importlib.util.find_spec("bmtrain") is None:
        pytest.skip("bmtrain is not installed (Python 3.10 or 3.11 on Linux has it)")


class _Stream:
    """A stream that never has to wait, since calls return only when they are done."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self, event: _Event) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event(_Stream):
    pass


@contextlib.contextmanager
def _stream(stream: _Stream) -> Iterator[None]:
    yield


def _fake_cuda() -> types.SimpleNamespace:
    # No `__getattr__` to torch.cuda: an unexpected use must fail, not half work.
    cuda = types.SimpleNamespace(
        Stream=_Stream,
        Event=_Event,
        stream=_stream,
        current_stream=_Stream,
        set_device=lambda device: None,
        current_device=lambda: 0,
        synchronize=lambda: None,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    for kind in ("Float", "Double", "Half", "BFloat16", "Char", "Byte", "Short", "Int"):
        setattr(cuda, f"{kind}Storage", getattr(torch, f"{kind}Storage"))
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    return cuda


class _Torch(types.ModuleType):
    """The torch that bmtrain sees: its factories make CPU tensors for any device."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _fake_cuda()
        # `fork_rng` always saves the CPU's generator.
        fork = functools.partial(torch.random.fork_rng, [])
        self.random = types.SimpleNamespace(fork_rng=lambda devices, enabled: fork(enabled))
        for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "zeros_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _is_cuda(tensor: Any) -> bool:
    """True if bmtrain asks, which refuses other tensors; false if torch itself asks."""
    return str(sys._getframe(1).f_globals.get("__name__", "")).startswith("bmtrain")


def _patch_tensors() -> None:
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    torch.storage.TypedStorage.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    same = lambda tensor, *args, **kwargs: tensor  # noqa: E731
    torch.Tensor.cuda = same  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = same  # type: ignore[method-assign, assignment]
    ignore = lambda tensor, stream: None  # noqa: E731
    torch.Tensor.record_stream = ignore  # type: ignore[method-assign]


def _at(pointer: int, count: int, kind: int) -> torch.Tensor:
    """Returns the memory at an address as a flat tensor."""
    dtype = _TYPES[kind]
    if count == 0:
        return torch.empty(0, dtype=dtype)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(buffer, dtype=dtype)


def _reduced(source: torch.Tensor, operation: int) -> torch.Tensor:
    wide = source.float() if source.dtype.is_floating_point and source.itemsize < 4 else source
    result = wide.clone()
    dist.all_reduce(result, _OPERATIONS[operation])
    if operation == _AVERAGE:
        result /= dist.get_world_size()
    return result.to(source.dtype)


class _Communicator:
    """NCCL's calls for the communicator of all ranks, over gloo; with pointers, as in C."""

    def unique_id(self) -> bytes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return str(port).encode()

    def init(self, unique_id: bytes, world_size: int, rank: int) -> int:
        store = dist.TCPStore(
            "127.0.0.1", int(unique_id), world_size, is_master=rank == 0, timeout=_TIMEOUT
        )
        _KEPT_ALIVE.append(store)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        atexit.register(process_group.leave)
        return 1

    def all_reduce(self, source: int, to: int, count: int, kind: int, op: int, *_: int) -> None:
        _at(to, count, kind).copy_(_reduced(_at(source, count, kind), op))

    def reduce_scatter(self, source: int, to: int, count: int, kind: int, op: int, *_: int) -> None:
        whole = _reduced(_at(source, count * dist.get_world_size(), kind), op)
        _at(to, count, kind).copy_(whole[dist.get_rank() * count :][:count])

    def all_gather(self, source: int, to: int, count: int, kind: int, *_: int) -> None:
        parts = [torch.empty(count, dtype=_TYPES[kind]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, _at(source, count, kind))
        _at(to, count * len(parts), kind).copy_(torch.cat(parts))

    def broadcast(self, source: int, to: int, count: int, kind: int, root: int, *_: int) -> None:
        value = _at(source, count, kind).clone()
        dist.broadcast(value, root)
        _at(to, count, kind).copy_(value)


def _patch_nccl(c: Any) -> None:
    communicator = _Communicator()
    c.ncclGetUniqueId = communicator.unique_id
    c.ncclCommInitRank = communicator.init
    c.ncclCommDestroy = lambda comm: process_group.leave()
    c.ncclCommCount = lambda comm: dist.get_world_size()
    c.ncclCommUserRank = lambda comm: dist.get_rank()
    c.ncclGroupStart = c.ncclGroupEnd = lambda: None
    c.ncclAllReduce = communicator.all_reduce
    c.ncclReduceScatter = communicator.reduce_scatter
    c.ncclAllGather = communicator.all_gather
    c.ncclBroadcast = communicator.broadcast


def _patch_kernels(c: Any) -> None:
    def has_nan_inf(kind: int) -> Callable[..., None]:
        def launch(count: int, values: int, scratch: int, result: int, stream: int) -> None:
            bad = not _at(values, count, kind).isfinite().all()
            _at(result, 1, 1).bitwise_or_(int(bad))

        return launch

    c.has_nan_inf_fp16_launcher = has_nan_inf(6)
    c.has_nan_inf_bf16_launcher = has_nan_inf(9)
    c.is_bf16_supported = lambda: True  # asks the GPU, also for the CPU kernel


def install() -> Any:
    """Make `import bmtrain` work without a GPU in this process; returns bmtrain."""
    import bmtrain

    view = _Torch()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "bmtrain" and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    _patch_tensors()
    _patch_nccl(bmtrain.C)
    _patch_kernels(bmtrain.C)
    return bmtrain


def run_ranks(script: str, world_size: int, *arguments: object, seconds: float = 280) -> None:
    """Run a file of tests/ in several processes, with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
    # With 2, bmtrain would pin each process to a core, on which others may be busy.
    variables |= {"LOCAL_WORLD_SIZE": 1000, "OMP_NUM_THREADS": 1}
    variables["PYTHONPATH"] = os.pathsep.join([str(_ROOT / "src"), str(_ROOT / "tests")])
    processes: list[subprocess.Popen[str]] = []
    for rank in range(world_size):
        names = {**variables, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            forked.Popen(
                [sys.executable, str(_ROOT / "tests" / script), *map(str, arguments)],
                env={**os.environ, **{name: str(value) for name, value in names.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
        )
    deadline = time.monotonic() + seconds
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + "\ntimed out")
    statuses = [process.returncode for process in processes]
    assert statuses == [0] * world_size, "\n".join(outputs)


def engines() -> tuple[Any, Callable[[torch.dtype], BMTrainEngine]]:
    """Returns bmtrain, and a function that makes this process's engine for a compute type."""
    bmt = install()
    from cpm_bee.engine.bmtrain_engine import BMTrainEngine

    def make(dtype: torch.dtype) -> BMTrainEngine:
        engine = BMTrainEngine(torch.device("cpu"), dtype)
        torch.set_num_threads(1)  # bmtrain sets it too
        return engine

    return bmt, make


def main() -> None:
    """Run a script with the engine allowed on a CPU."""
    from cpm_bee.engine import bmtrain_engine

    install()
    bmtrain_engine.unavailable_reason = lambda device: None
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
