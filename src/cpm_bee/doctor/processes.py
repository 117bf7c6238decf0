"""Steps of `doctor.py --gpu` with two processes: real runs of finetune_cpm_bee.py under torchrun.

Their losses are compared with those of one process with the same rows a step. What rounding does is
measured by one process that computes its steps in smaller parts (`--max-tokens`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpm_bee.checkpoint.reader import save_tensors
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import judge
from cpm_bee.doctor.child import Context
from cpm_bee.doctor.facts import SRC
from cpm_bee.doctor.runner import descendants, end_processes, is_running
from cpm_bee.engine import bmtrain_engine

_STEPS = 8
_RECORDS = 48
_ROWS = 4  # of a step, over all processes
_LOST_SECONDS = 60  # within which a lost process has to be named
_RUN_SECONDS = 80


def exchange(context: Context) -> None:
    """Two processes add up their tensors; nothing but the connection is used."""
    output = context.folder / "exchange.json"
    arguments = ["-m", "cpm_bee.doctor.ranks", context.device.type, str(output)]
    status, text = _finish(_start(_torchrun(2) + arguments), _RUN_SECONDS)
    context.check("both processes end", status == 0, _tail(text) if status else "status 0")
    if status == 0:
        found = json.loads(output.read_text(encoding="utf-8"))
        context.check("sums", found["right"], f"{found['backend']}, {found['text']}")


def ddp(context: Context) -> None:
    _compare(context, _Baseline.of(context), "ddp", "--parallel", "ddp")


def fsdp(context: Context) -> None:
    baseline = _Baseline.of(context)
    _compare(context, baseline, "fsdp", "--parallel", "fsdp")
    if context.on_cpu:
        context.needs_cuda("offload")
    else:
        _compare(context, baseline, "offload", "--parallel", "fsdp", "--offload")


def resume(context: Context) -> None:
    """A run goes on with another number of processes and another strategy."""
    flags, expected, parts = _Baseline.of(context)
    third = _STEPS // 3
    _one(flags, "relay", "--max-steps", str(third))
    more = ["--save-name", "relay", "--resume"]
    two = [*_two(flags), *more, "--parallel", "fsdp", "--max-steps", str(2 * third)]
    status, text = _finish(_start(_torchrun(2) + two), _RUN_SECONDS)
    context.check("two processes go on", status == 0, _tail(text) if status else "fsdp")
    if status == 0:
        actual = _one(flags, "relay", "--resume")
        context.add(judge("losses", actual, [parts], expected, torch.float32))


def kill(context: Context) -> None:
    """A process that is killed is named soon, and its run leaves a state to go on from."""
    flags = [*_two(_prepare(context)), "--save-name", "lost", "--epoch", "100000"]
    flags += ["--max-steps", "100000", "--parallel", "ddp", "--save-interval", "1"]
    output = context.folder / "output"
    with _started(_torchrun(2) + flags, output) as process:
        victim = _wait_for_steps(context.folder / "results" / "lost-log.jsonl", process)
        if victim is None:
            context.check("a run of two processes", False, _tail(_text(output)))
            return
        began, started = time.monotonic(), descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOST_SECONDS)
        seconds, status = time.monotonic() - began, process.poll()
        context.check("the run ends", status not in (None, 0), f"{seconds:.0f} s, status {status}")
        left = [pid for pid in started if is_running(pid)]
        context.check("no process is left", not left, f"{len(left)} of {len(started)}")
    text = _text(output)
    context.check("it is named", "rank 1 of this run has ended" in text, _tail(text))
    partial = [p.name for p in (context.folder / "results").rglob("*.partial-*")]
    context.check("no partial file", not partial, ", ".join(partial) or "none")
    again = [*_flags(context), "--save-name", "lost", "--resume", "--dry-run"]
    status, text = _finish(_start([sys.executable, str(_script()), *again]), _RUN_SECONDS)
    context.check("its state can be loaded", status == 0, _tail(text) if status else "--resume")


def bmtrain(context: Context) -> None:
    """The bmtrain engine gives the losses of the torch engine, in fp32 and fp16."""
    reason = bmtrain_engine.unavailable_reason(context.device)
    if reason is not None:
        context.not_available("bmtrain", reason)
        return
    flags, expected, parts = _Baseline.of(context)
    half = _one(flags, "torch-fp16", "--dtype", "fp16")
    ranks = 2 if torch.cuda.device_count() > 1 else 1
    for name, dtype, trusted in (("fp32", torch.float32, parts), ("fp16", torch.float16, half)):
        own = _two(flags) if ranks == 2 else [str(_script()), *flags]
        more = ["--save-name", f"bmtrain-{name}", "--engine", "bmtrain", "--dtype", name]
        status, text = _finish(_start([*_torchrun(ranks), *own, *more]), _RUN_SECONDS)
        context.check(f"{name}, {ranks} process(es)", status == 0, _tail(text) if status else "")
        if status == 0:
            actual = _losses(context.folder / "results", f"bmtrain-{name}")
            context.add(judge(f"{name}, losses", actual, [trusted], expected, dtype))


class _Baseline(NamedTuple):
    """A run of one process, and one that shows what rounding does to it."""

    flags: list[str]
    losses: dict[str, torch.Tensor]
    in_parts: dict[str, torch.Tensor]

    @classmethod
    def of(cls, context: Context) -> _Baseline:
        flags = _prepare(context)
        return cls(flags, _one(flags, "one"), _one(flags, "parts", "--max-tokens", "60"))


def _compare(context: Context, baseline: _Baseline, name: str, *more: str) -> None:
    """Run two processes with more flags, and compare their losses with those of one."""
    two = [*_two(baseline.flags), *more, "--save-name", name]
    status, text = _finish(_start(_torchrun(2) + two), _RUN_SECONDS)
    context.check(f"{name}, both processes end", status == 0, _tail(text) if status else "status 0")
    if status == 0:
        actual = _losses(context.folder / "results", name)
        line = judge(f"{name}, losses", actual, [baseline.in_parts], baseline.losses, torch.float32)
        context.add(line)


def _prepare(context: Context) -> list[str]:
    """Write a data set and a model; returns the flags of a run on them."""
    _write_inputs(context)
    return _flags(context)


def _flags(context: Context) -> list[str]:
    folder = context.folder
    return [
        *("--dataset", str(folder / "data" / "train"), "--load", str(folder / "model")),
        *("--save", str(folder / "results"), "--device", context.device.type, "--dtype", "fp32"),
        *("--engine", "torch", "--attention", "sdpa", "--use-delta", "--epoch", "100"),
        *("--max-steps", str(_STEPS), "--batch-size", str(_ROWS), "--max-length", "128"),
        *("--lr", "0.01", "--lr-decay-style", "constant", "--warmup-iters", "0"),
    ]


def _write_inputs(context: Context) -> None:
    folder = context.folder
    lines = [json.dumps(r, ensure_ascii=False) for r in workload.records(_RECORDS)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source, output = folder / "train.jsonl", folder / "data"
    preprocess(source, output, "data", seed=0, overwrite=False, block_size=1 << 20)
    model = folder / "model"
    model.mkdir()
    config = workload.make_config(context.device)
    made = workload.make_model(config, lora=False)
    save_tensors(model / "pytorch_model.bin", dict(made.state_dict()))
    (model / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (model / "vocab.txt").write_text("\n".join(workload.TOKENIZER.tokens), encoding="utf-8")


def _two(flags: list[str]) -> list[str]:
    """The flags of each of two processes: the same rows a step. The last of equal flags counts."""
    return [str(_script()), *flags, "--batch-size", str(_ROWS // 2)]


def _one(flags: list[str], name: str, *more: str) -> dict[str, torch.Tensor]:
    """Run a fine-tuning in this process; returns its losses."""
    from cpm_bee.train.options import Options
    from cpm_bee.train.setup import finetune

    options = Options.parse([*flags, "--save-name", name, *more])
    finetune(options)
    return _losses(Path(options.save), name)


def _losses(results: Path, name: str) -> dict[str, torch.Tensor]:
    events = map(json.loads, (results / f"{name}-log.jsonl").read_text("utf-8").splitlines())
    return {
        f"step {e['step']}": torch.tensor(e["loss"], dtype=torch.float64)
        for e in events
        if e["event"] == "train"
    }


def _script() -> Path:
    return SRC / "finetune_cpm_bee.py"


def _torchrun(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*launcher, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def _finish(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Wait for a process; returns its exit status and output. Ends it after `seconds`."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_processes(process)
        return -1, f"no end within {seconds:.0f} seconds"
    return process.returncode, text


@contextlib.contextmanager
def _started(command: list[str], output: Path) -> Iterator[subprocess.Popen[Any]]:
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            end_processes(process)


def _wait_for_steps(log: Path, process: subprocess.Popen[Any]) -> int | None:
    """Returns the id of rank 1 once a run has logged three steps; None if it ends before."""
    deadline = time.monotonic() + _RUN_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text("utf-8", "replace").count('"event": "train"') >= 3:
            for pid in descendants(process.pid):
                with contextlib.suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if b"RANK=1" in variables:
                        return pid
        time.sleep(0.2)
    return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _tail(text: str) -> str:
    """The line that says most of a failed run: our own message, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error:")]
    return (own or lines or ["no output"])[-1][:300]
