"""Faults put into the code are seen by the steps of doctor.py --gpu, here on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cpm_bee.doctor import (
    attention,
    compilers,
    copies,
    generation,
    memory,
    processes,
    quantization,
    steps,
    training,
    workload,
)
from cpm_bee.doctor.child import Context
from cpm_bee.doctor.report import FAULT, NOT_AVAILABLE, OK
from cpm_bee.engine.adamw import AdamW
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.errors import InputError
from cpm_bee.generate.decoder import Decoder
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.frozen import block as frozen_block
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.train import prefetch

Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")


def faults(step: Callable[[Context], None], folder: Path) -> list[str]:
    context = Context(CPU, folder)
    step(context)
    assert context.lines
    return [line.what for line in context.lines if line.verdict == FAULT]


def changed(
    owner: Any, name: str, patch: Patch, change: Callable[[Any], Any], when: Any = None
) -> None:
    """Replace what a function returns by `change` of it, where `when` of its arguments is true."""
    true = getattr(owner, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = true(*args, **kwargs)
        return change(result) if when is None or when(*args, **kwargs) else result

    patch.setattr(owner, name, wrong)


# ------------------------------------------------------------------ attention


def is_192(q: torch.Tensor, *args: Any) -> bool:
    return q.shape[-2] % 128 == 64


def test_nan_at_length_192(tmp_path: Path, monkeypatch: Patch) -> None:
    """The fault that is reported for cuDNN: gradients alone are NaN, at length % 128 == 64."""

    def nan_gradient(output: torch.Tensor) -> torch.Tensor:
        output.register_hook(lambda g: g * float("nan"))
        return output

    changed(F, "scaled_dot_product_attention", monkeypatch, nan_gradient, is_192)
    found = faults(attention.sdpa, tmp_path)
    assert len(found) == 6 and all("192" in what for what in found)


def test_a_kernel_that_forgets_the_last_key(tmp_path: Path, monkeypatch: Patch) -> None:
    true = F.scaled_dot_product_attention

    def wrong(q: Any, k: Any, v: Any, bias: Any, p: float) -> torch.Tensor:
        if k.shape[-2] % 2:  # odd lengths
            bias = bias.clone()
            bias[..., 0] = float("-inf")
        return true(q, k, v, bias, p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    assert len([w for w in faults(attention.sdpa, tmp_path) if "odd" in w]) == 6


# ------------------------------------------------------------------ training


@pytest.fixture
def only_tested(monkeypatch: Patch) -> Callable[[], bool]:
    """Whether the tested computation runs now, and not those that it is compared with."""
    running: list[bool] = []
    for name in ("train_exactly", "train_trusted"):
        true = getattr(workload, name)

        def reference(*args: Any, true: Any = true, **kwargs: Any) -> Any:
            running.append(True)
            try:
                return true(*args, **kwargs)
            finally:
                running.pop()

        monkeypatch.setattr(workload, name, reference)
    return lambda: not running


def test_a_wrong_loss(tmp_path: Path, monkeypatch: Patch, only_tested: Callable[[], bool]) -> None:
    from cpm_bee.model.network import CPMBee

    changed(CPMBee, "loss", monkeypatch, lambda x: x * 1.00001, lambda *a: only_tested())
    assert "LoRA, losses" in faults(training.fp32, tmp_path)


def test_an_optimizer_that_decays_twice(
    tmp_path: Path, monkeypatch: Patch, only_tested: Callable[[], bool]
) -> None:
    true = AdamW.step

    def wrong(self: AdamW, parameters: Any, gradients: Any, lr: float) -> None:
        true(self, parameters, gradients, lr)
        for p in parameters.values() if only_tested() else ():
            p.detach().mul_(1 - lr * 0.01)

    monkeypatch.setattr(AdamW, "step", wrong)
    found = faults(training.fp32, tmp_path)
    assert "in full, updates" in found and "in full, gradients" not in found


@pytest.mark.slow
def test_a_step_that_is_not_skipped(tmp_path: Path, monkeypatch: Patch) -> None:
    """Gradients that overflow and are cut to zeros: no step is skipped, no scale is halved."""

    def cut(norm: Any) -> float:
        return 1.0

    from cpm_bee.engine import torch_engine

    changed(torch_engine, "clip_by_global_norm", monkeypatch, cut)
    context = Context(CPU, tmp_path)
    training._overflow(context)
    found = [line.what for line in context.lines if line.verdict == FAULT]
    assert {"overflow is seen", "scale is found"} <= set(found)


def test_recomputing_with_another_dropout_mask(tmp_path: Path, monkeypatch: Patch) -> None:
    changed(frozen_block, "is_frozen", monkeypatch, lambda frozen: False)
    true = TransformerBlock.layer_output
    calls = iter(range(10**6))

    def wrong(self: TransformerBlock, h: torch.Tensor, *args: Any) -> torch.Tensor:
        return true(self, h * (1 + 1e-4 * (next(calls) % 2)) if self.checkpointing else h, *args)

    monkeypatch.setattr(TransformerBlock, "layer_output", wrong)
    assert "LoRA with dropout, gradients" in faults(training.checkpointing, tmp_path)


# ------------------------------------------------------------------ copies, bases, generation


def test_a_copy_that_is_overwritten(tmp_path: Path, monkeypatch: Patch) -> None:
    true = prefetch._Copier.receive

    def wrong(self: Any, copy: Any) -> Any:
        batches = true(self, copy)
        batches[0].ids[-1] += 1
        return batches

    monkeypatch.setattr(prefetch._Copier, "receive", wrong)
    assert "round 0, batch 7" in faults(copies.prefetching, tmp_path)


def test_a_wrong_product_of_a_quantized_layer(tmp_path: Path, monkeypatch: Patch) -> None:
    def few(self: QuantizedLinear, x: torch.Tensor) -> bool:
        return x.numel() <= 16 * self.dim_in  # as with a kernel for a few rows

    changed(QuantizedLinear, "base", monkeypatch, lambda y: y * 1.1, few)
    found = faults(quantization.quantize, tmp_path)
    assert [w for w in found if "product" in w] == [
        f"{fmt}, product of 4 rows, {dtype}"
        for fmt in ("nf4", "int8")
        for dtype in ("float32", "bfloat16")
    ]


def test_logits_of_another_token(tmp_path: Path, monkeypatch: Patch) -> None:
    def in_bf16(self: Decoder, *args: Any) -> bool:
        return self._model.input_embedding.weight.dtype == torch.bfloat16

    # The trusted computation on the CPU has the fault too; the exact one shows it.
    changed(Decoder, "_next_logits", monkeypatch, lambda x: x.roll(1, 0) * 2, in_bf16)
    assert faults(generation.generation, tmp_path) == ["bf16, logits with a KV cache"]


def test_other_answers(tmp_path: Path, monkeypatch: Patch) -> None:
    answers = iter(["春", "夏"] * 100)
    monkeypatch.setattr(
        generation.Generator, "generate", lambda self, r, o: {"<ans>": next(answers)}
    )
    monkeypatch.setattr(generation, "_DTYPES", {})
    monkeypatch.setattr(generation, "_RECORDS", 1)
    assert faults(generation.generation, tmp_path) == []
    next(answers)
    monkeypatch.setattr(generation, "_answers", lambda *a: [next(answers)])
    assert faults(generation.generation, tmp_path) == ["fp32, answers"]


# ------------------------------------------------------------------ compilers, memory


def test_compiled_layers_that_are_wrong(
    tmp_path: Path, monkeypatch: Patch, only_tested: Callable[[], bool]
) -> None:
    from cpm_bee.model import compiled as product

    def wrong(encoder: Any) -> None:
        for layer in encoder.layers:
            layer.compiled_layer = lambda *a, own=layer: own.layer_output(*a) * 1.01

    monkeypatch.setattr(product, "compile_blocks", wrong)
    monkeypatch.setattr(product, "BACKEND", product.BACKEND)  # which the step changes
    found = faults(compilers.compiled, tmp_path)
    # Nothing was compiled, and the results are others.
    assert found == [f"float32, {w}" for w in ("losses", "gradients", "updates", "3 batches")]


def test_too_many_entries_of_dynamo(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    for entries, verdict in ((0, FAULT), (64, OK), (65, FAULT)):
        context = Context(CPU, tmp_path)
        counters.clear()
        counters["stats"]["unique_graphs"] = entries
        compilers._check_entries(context, "batches", 1.0)
        assert [line.verdict for line in context.lines] == [verdict]
    counters.clear()


@pytest.mark.parametrize("reason", [None, "mismatch: 0.3 instead of 0.1"])
def test_the_probe_of_flex(tmp_path: Path, monkeypatch: Patch, reason: str | None) -> None:
    config = workload.make_config(CPU)

    class Probe:
        @staticmethod
        def probe(given: Any, *, dtype: torch.dtype, device: torch.device) -> str | None:
            assert (given, dtype, device) == (config, torch.bfloat16, CPU)
            return reason

    monkeypatch.setitem(sys.modules, compilers._PROBE, Probe)  # type: ignore[arg-type]
    context = Context(CPU, tmp_path)
    compilers._probe(context, config, torch.bfloat16)
    (line,) = context.lines
    assert line.verdict == (OK if reason is None else FAULT)
    assert reason is None or line.text == reason
    monkeypatch.setitem(sys.modules, compilers._PROBE, None)  # type: ignore[arg-type]
    compilers._probe(context, config, torch.bfloat16)
    assert context.lines[1].verdict == NOT_AVAILABLE


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [(89, FAULT), (91, OK), (109, OK), (119, OK), (121, FAULT)],
)
def test_memory_beyond_its_prediction(tmp_path: Path, measured: int, verdict: str) -> None:
    context = Context(CPU, tmp_path)
    mib = memory.MIB
    memory.compare(context, "LoRA", 100 * mib, measured * mib, slack=10 * mib)
    (line,) = context.lines
    assert line.verdict == verdict
    assert line.text == f"predicted 100 MiB, measured {measured} MiB, allowed 90 to 120"


# ------------------------------------------------------------------ several processes


def fake_run(monkeypatch: Patch, code: str, losses: list[float] | None = None) -> None:
    """Replace torchrun by a line of Python, and the log of its run by these losses."""
    monkeypatch.setattr(processes, "_torchrun", lambda ranks: [sys.executable, "-c", code])
    if losses is not None:
        found = {f"step {i}": torch.tensor(x).double() for i, x in enumerate(losses)}
        monkeypatch.setattr(processes, "_losses", lambda *a: found)


def compared(tmp_path: Path) -> list[tuple[str, str]]:
    one = {f"step {i}": torch.tensor(x).double() for i, x in enumerate((3.0, 2.0))}
    context = Context(CPU, tmp_path)
    processes._compare(context, processes._Baseline([], one, one), "ddp")
    return [(line.what, line.verdict) for line in context.lines]


ENDS = "ddp, both processes end"


def test_losses_of_two_processes(tmp_path: Path, monkeypatch: Patch) -> None:
    for losses, verdict in (([3.0, 2.0], OK), ([3.0, 2.001], FAULT), ([3.0], FAULT)):
        fake_run(monkeypatch, "", losses)
        assert compared(tmp_path) == [(ENDS, OK), ("ddp, losses", verdict)]


def test_processes_that_fail_or_hang(tmp_path: Path, monkeypatch: Patch) -> None:
    fake_run(monkeypatch, "print('error: no NCCL'); raise SystemExit(1)")
    assert compared(tmp_path) == [(ENDS, FAULT)]
    monkeypatch.setattr(processes, "_RUN_SECONDS", 1)
    fake_run(monkeypatch, "import time; time.sleep(600)")
    assert compared(tmp_path) == [(ENDS, FAULT)]


def test_wrong_sums(tmp_path: Path, monkeypatch: Patch) -> None:
    found = {"right": False, "backend": "nccl", "text": "2 processes"}
    (tmp_path / "exchange.json").write_text(json.dumps(found))
    fake_run(monkeypatch, "")
    assert faults(processes.exchange, tmp_path) == ["sums"]


def test_a_lost_process_that_nobody_names(tmp_path: Path, monkeypatch: Patch) -> None:
    """Stands in for torchrun and its rank 1: the rest neither ends nor names the one that died."""
    code = (
        "import os, subprocess, sys, time\n"
        "for rank in '01':\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " env={**os.environ, 'RANK': rank})\n"
        "time.sleep(600)\n"
    )
    fake_run(monkeypatch, code)
    (tmp_path / "results").mkdir()
    log = '{"event": "train"}\n' * 3
    (tmp_path / "results" / "lost-log.jsonl").write_text(log)
    (tmp_path / "results" / "state.partial-7").write_text("")
    monkeypatch.setattr(processes, "_write_inputs", lambda context: None)
    monkeypatch.setattr(processes, "_LOST_SECONDS", 1)
    monkeypatch.setattr(processes, "_finish", lambda process, seconds: (2, "error: no state"))
    monkeypatch.setattr(processes, "_start", lambda command: subprocess.Popen(["true"]))
    found = faults(processes.kill, tmp_path)
    assert found == [
        "the run ends",
        "no process is left",
        "it is named",
        "no partial file",
        "its state can be loaded",
    ]


def test_steps_are_chosen_by_name() -> None:
    chosen = [step.name for step in steps.choose(["fp32", "sdpa"])]
    assert chosen == ["sdpa", "fp32"]  # in their order
    assert len(steps.choose(None)) == len(steps.STEPS) == 17
    for names in (["fp31"], []):
        with pytest.raises(InputError, match="no such step; choose from sdpa, fp32"):
            steps.choose(names)


def test_the_engine_is_the_product_s(tmp_path: Path) -> None:
    run = workload.train(
        workload.make_model(workload.make_config(CPU), lora=True),
        [workload.batch_of(workload.records(3))],
        CPU,
        torch.float32,
    )
    assert isinstance(run.engine, TorchEngine)
