"""Measures, in a process of its own, what cannot be computed: the process itself, and time.

    python -m cpm_bee.train.plan.measurement < REQUEST      (`measure` starts it)

The process imports what a run imports, opens the same files, and trains and evaluates a model of
two and of three layers of the real sizes, with random weights, on a batch of the data's shape. What
it holds when all tensors are gone is what a run holds besides its tensors: Python, the libraries'
code, buffers of the matrix products, the vocabulary, fragments of malloc. The difference between
both models is the time of a layer.
"""

from __future__ import annotations

import cpm_bee.cli  # sets OMP_WAIT_POLICY, before torch is loaded  # isort: skip

import gc
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import cpm_bee
from cpm_bee.errors import RunError
from cpm_bee.paths import existing_parent
from cpm_bee.train.options import Options

_RUN = "cpm_bee.train.setup"  # what a run has loaded
_FLOPS = 1e11  # of a timed step, about: a second or a few
_LEAST_TOKENS = 64
_LAYERS = (2, 3)
_SAVED = 64 << 20  # bytes of a timed save
_READ = 64 << 20  # bytes of a timed read
_DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, and of an evaluation, of so many tokens on the whole model."""

    tokens: int
    train: float
    evaluate: float
    train_cpu: float  # CPU time of the process
    evaluate_cpu: float


@dataclass(frozen=True)
class Measured:
    """What the process has found.

    Attributes:
        anonymous, mapped: bytes of resident memory without tensors, and in pages of files.
        start: seconds from the start of the process to the begin of loading.
        read_rate, save_rate: bytes per second, of the checkpoint's file and of saving.
        step: None where the layers do not fit into memory; `reason` tells why.
    """

    anonymous: int
    mapped: int
    start: float
    start_cpu: float
    read_rate: float
    save_rate: float
    step: StepTime | None
    reason: str = ""


def measure(options: Options, lengths: list[int], num_targets: list[int], pairs: int) -> Measured:
    """Measure in a child process, which has no other ranks.

    Args:
        lengths, num_targets: of the records of a typical micro-batch.
        pairs: its extension entries.

    Raises:
        RunError: the process has failed.
    """
    request = {
        "options": asdict(replace(options, dry_run=True)),
        "lengths": lengths,
        "num_targets": num_targets,
        "pairs": pairs,
    }
    environment = {k: v for k, v in os.environ.items() if k not in _DISTRIBUTED}
    source = str(Path(cpm_bee.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [source, environment.get("PYTHONPATH", "")])
    )
    done = subprocess.run(
        [sys.executable, "-m", "cpm_bee.train.plan.measurement"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(
            f"the process that measures a step ended with status {done.returncode}: {last}"
        )
    values = json.loads(done.stdout.splitlines()[-1])
    step = values.pop("step")
    return Measured(**values, step=None if step is None else StepTime(**step))


def _main() -> None:
    request = json.load(sys.stdin)
    values = request["options"]
    values["report_to"] = tuple(values["report_to"])
    if values["delta_targets"] is not None:
        values["delta_targets"] = tuple(values["delta_targets"])
    print(json.dumps(asdict(_measure(Options(**values), request))))


def _measure(options: Options, request: dict[str, Any]) -> Measured:
    from cpm_bee.model.frozen.buffers import buffer_pool, return_freed_memory
    from cpm_bee.train.activation_checkpointing import choose_for_run
    from cpm_bee.train.checks import check

    importlib.import_module(_RUN)  # by name, as it imports this package for a dry run
    inputs = check(options)
    start, start_cpu = _since_start(), time.process_time()
    choose_for_run(  # as a run does; it may load what predicts memory
        options,
        inputs.pretrained.model.config,
        inputs.delta_config,
        inputs.device,
        inputs.dtype,
        *inputs.surveys["--dataset"][1:3],
        num_processes=1,
        is_sharded=False,
    )
    if inputs.device.type == "cpu":
        return_freed_memory()
    read_rate = _read_rate(options, inputs)
    save_rate = _save_rate(options.save)
    step, reason = _step_time(options, inputs, request)
    inputs.pretrained.model.to("meta")
    buffer_pool._storages.clear()
    gc.collect()
    status = _status()
    return Measured(
        status["RssAnon"], status["RssFile"], start, start_cpu, read_rate, save_rate, step, reason
    )


def _status() -> dict[str, int]:
    """The lines of /proc/self/status that are sizes, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {w[0][:-1]: 1024 * int(w[1]) for w in lines if len(w) == 3 and w[2] == "kB"}


def _since_start() -> float:
    """Seconds since this process was started, by the clock of the kernel."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begin


def _read_rate(options: Options, inputs: Any) -> float:
    """Bytes of weights in memory per second, from reading a part of the largest tensor."""
    from cpm_bee.checkpoint.loading import on_device

    model = dict(inputs.pretrained.model.named_parameters())
    entries = dict(inputs.pretrained.tensors()) if options.load is not None else {}
    if not entries:
        return 0.0
    name = max(entries, key=lambda n: entries[n].read().numel())
    entry, p = entries[name], model.get(name)
    dtype = entry.dtype if p is None else p.dtype
    rows = max(1, _READ // max(1, dtype.itemsize * entry.read()[0].numel()))
    part = entry.read()[:rows]
    begin = time.perf_counter()
    value = on_device(part, inputs.device, dtype)
    if value is part:
        value = part.clone()
    return float(value.nbytes / max(1e-6, time.perf_counter() - begin))


def _save_rate(folder: str) -> float:
    """Bytes of trained values per second, copied and saved to the disk that the results go to."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder)) as file:
            seconds = _save_seconds(file)
            begin = time.perf_counter()
            os.fsync(file.fileno())
            return _SAVED / (seconds + time.perf_counter() - begin)
    except (OSError, RuntimeError):  # torch's own error where the disk is full, as the plan says
        return _SAVED / _save_seconds(io.BytesIO())


def _save_seconds(file: IO[bytes]) -> float:
    import torch

    values = torch.ones(_SAVED // 4)
    begin = time.perf_counter()
    torch.save({"values": values.to("cpu", copy=True)}, file)
    file.flush()
    return time.perf_counter() - begin


def _step_time(
    options: Options, inputs: Any, request: dict[str, Any]
) -> tuple[StepTime | None, str]:
    from cpm_bee.engine.device import free_memory
    from cpm_bee.train.memory_estimate import TrainingSetup, meta_model, typical_batch

    config = inputs.pretrained.model.config
    training = TrainingSetup(
        inputs.dtype, inputs.delta_config, options.quantize, options.checkpointing == "full"
    )
    depth = config.num_layers
    depths = [depth] if depth <= _LAYERS[1] else list(_LAYERS)
    largest = _cut(config, depths[-1])
    model = meta_model(largest, training)
    values = sum(p.numel() for p in model.parameters())
    needed = values * (16 if training.delta is None else 4)
    available = free_memory(inputs.device)
    if 1.5 * needed > available:
        gib = 2**30
        return None, (
            f"{depths[-1]} layers need {needed / gib:.1f} GiB of {available / gib:.1f} GiB"
        )
    of_layers = sum(p.numel() for p in model.encoder.parameters())
    tokens = max(_LEAST_TOKENS, int(_FLOPS / (6 * max(1, of_layers))))
    lengths, targets = _first(request["lengths"], request["num_targets"], tokens)
    batches = [
        typical_batch(
            lengths, targets, config.vocab_size, num_pairs=request["pairs"], as_generated=generated
        )
        for generated in (False, True)
    ]
    found = [_times(_cut(config, n), training, batches, inputs.device) for n in depths]
    whole = found[-1]
    if depth > depths[-1]:
        more = depth - depths[-1]
        whole = [b + more * max(0.0, b - a) for a, b in zip(found[0], found[1], strict=True)]
    train, train_cpu, evaluate, evaluate_cpu = whole
    return StepTime(sum(lengths), train, evaluate, train_cpu, evaluate_cpu), ""


def _first(lengths: list[int], targets: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """The first records, about so many tokens; at least one."""
    total, count = 0, 0
    for length in lengths:
        if count and total + length > tokens:
            break
        total, count = total + length, count + 1
    return lengths[:count], targets[:count]


def _cut(config: Any, depth: int) -> Any:
    """The config with fewer layers, none of them pruned."""
    return (
        config if depth == config.num_layers else replace(config, num_layers=depth, mask_modules=())
    )


def _times(config: Any, training: Any, batches: list[Any], device: Any) -> list[float]:
    """Seconds and CPU seconds of a training step, then those of an evaluation."""
    import torch

    from cpm_bee.engine import OptimizerSettings
    from cpm_bee.engine.torch_engine import TorchEngine
    from cpm_bee.quantize.formats import FORMATS
    from cpm_bee.quantize.linear import QuantizedLinear
    from cpm_bee.train.memory_estimate import meta_model, set_parameters

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.normal_(std=0.02) if dtype.is_floating_point else empty.random_(0, 100)

    model = meta_model(config, training)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.format = FORMATS[training.quantize]
    set_parameters(model, training, make)
    engine = TorchEngine(device, training.dtype)
    engine.prepare(model, OptimizerSettings(0.01, 1.0, 1.0, 2.0, 512))
    batch, scored = (b.to(device) for b in batches)

    def train() -> None:
        with engine.autocast():
            loss = model.loss(batch)
        engine.backward(loss / batch.num_targets)
        engine.step(0.0)

    def evaluate() -> None:
        model.eval()
        with engine.autocast():
            model.score(scored)
        model.train()

    return [*_best(train, device), *_best(evaluate, device)]


def _best(function: Callable[[], None], device: Any, repeats: int = 2) -> tuple[float, float]:
    import torch

    function()  # the first one loads kernels and makes buffers
    found = []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - begin, time.process_time() - begin_cpu))
    return min(f[0] for f in found), min(f[1] for f in found)


if __name__ == "__main__":
    _main()
