"""The probe accepts what is right, and names whatever else an attention function can do.

PyTorch's compiled FlexAttention has no backward pass on a CPU, so the compiler's failures are
injected here; FlexAttention itself is tried in its plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch.nn.attention import flex_attention as torch_flex

from cpm_bee.data.batch import Batch
from cpm_bee.model import flex_attention, flex_probe
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias
from cpm_bee.model.flex_probe import probe
from cpm_bee.segments import HIDDEN
from cpm_bee.train import setup
from cpm_bee.train.options import Options

CPU = torch.device("cpu")
CONFIG = tiny.make_config(num_heads=2, dim_head=16)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


class Changed:
    """SDPA, with a change of its inputs or its output."""

    def __init__(self, inputs: Callable[..., Any], output: Callable[..., Any]) -> None:
        self._change_inputs, self._change_output = inputs, output

    def __call__(self, batch: Batch, bias: PositionBias, *, at_targets: bool) -> Any:
        groups = PaddedGroups.of(batch, bias, at_targets=at_targets)
        attend = PaddedAttention(groups, bias, bias.relative_attention_bias.dtype, 0.0)

        def changed(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            return self._change_output(attend(layer, *self._change_inputs(*qkv)))

        return changed


def unchanged(*tensors: torch.Tensor) -> Any:
    return tensors if len(tensors) > 1 else tensors[0]


def test_three_records_of_several_blocks_a_token_more_and_less() -> None:
    batch = flex_probe._batch(CONFIG)
    assert batch.lengths == (300, 129, 40)
    assert batch.num_targets == 100 + 43 + 13
    assert batch.relations.view(3, 3, 3).diagonal(dim1=1, dim2=2).max() == 0
    assert torch.nonzero(batch.relations == HIDDEN).tolist() == [[3]]


@dtypes
def test_the_plain_form_agrees(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    assert probe(CONFIG, dtype, CPU, flex_attention.FlexAttention) is None


def test_what_in_context_samples_do_not_see_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)

    def sees_all(batch: Batch, bias: PositionBias, *, at_targets: bool) -> Any:
        relations = torch.where(batch.relations == HIDDEN, 1, batch.relations)
        seen = replace(batch, relations=relations, has_samples=False)
        return flex_attention.FlexAttention(seen, bias, at_targets=at_targets)

    reason = probe(CONFIG, torch.float32, CPU, sees_all)
    assert str(reason).startswith("its output differs from that of sdpa by ")


@dtypes
def test_a_wrong_output(dtype: torch.dtype) -> None:
    """The keys past the last whole block are lost, or one row is wrong."""

    def whole_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        kept = torch.arange(len(v)) < len(v) // 128 * 128
        return q, k, v * kept[:, None, None]

    def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def output(o: torch.Tensor) -> torch.Tensor:
            rows = torch.ones(len(o), 1, 1, dtype=o.dtype)
            rows[-1] = factor
            return o * rows

        return output

    assert probe(CONFIG, dtype, CPU, Changed(unchanged, unchanged)) is None
    wrong = [Changed(unchanged, scaled(factor)) for factor in (0.9, float("nan"))]
    for attention in (Changed(whole_blocks, unchanged), *wrong):
        reason = str(probe(CONFIG, dtype, CPU, attention))
        assert reason.startswith("its output differs from that of sdpa by ")


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> torch.Tensor:
        changed = g[0].clone()
        changed[0, 0] *= 0.8  # one head of one token, which many others see
        return changed


@dtypes
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_gradient(dtype: torch.dtype, wrong: int) -> None:
    def inputs(*qkv: torch.Tensor) -> list[torch.Tensor]:
        return [_WrongGradient.apply(x) if i == wrong else x for i, x in enumerate(qkv)]

    reason = str(probe(CONFIG, dtype, CPU, Changed(inputs, unchanged)))
    assert reason.startswith(f"its gradient of {'qkv'[wrong]} differs")


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> Any:
        raise RuntimeError("no valid triton configs.\n\nmore")


# As the compiler reports an error of one of its processes.
IN_A_PROCESS = """SubprocException: An exception occurred in a subprocess:

Traceback (most recent call last):
  File "worker.py", line 1, in work
ValueError: first
During handling of the above exception, another exception occurred:
RuntimeError: Failed to find C compiler. Please specify via CC environment variable.

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(IN_A_PROCESS), "RuntimeError: Failed to find C compiler. Please specify"),
        (NotImplementedError("NYI: head_dim 24\n\nmore"), "NotImplementedError: NYI: head_dim 24"),
        (AssertionError(), "AssertionError"),
        (ValueError("x" * 9999), f"ValueError: {'x' * 188} …"),
    ],
)
def test_one_line_for_any_failure(error: Exception, line: str) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    for attention in (fails, Changed(unchanged, fails)):  # as it is made, or called
        reason = str(probe(CONFIG, torch.float32, CPU, attention))
        assert reason.startswith(f"it fails here: {line}")
        assert "\n" not in reason and len(reason) < 230


def test_a_failing_backward_pass() -> None:
    reason = probe(CONFIG, torch.float32, CPU, Changed(unchanged, _FailingBackward.apply))
    assert reason == "it fails here: RuntimeError: no valid triton configs."


def test_an_interruption_is_no_failure() -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(CONFIG, torch.float32, CPU, interrupted)


def test_what_is_known_without_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(CONFIG, torch.float32, CPU) == "it has no backward pass on a cpu"
    monkeypatch.setattr(flex_attention, "unavailable_reason", lambda *_: None)
    small = tiny.make_config(dim_head=8)
    assert probe(small, torch.float32, CPU) == "its kernels need dim_head 16 or more, not 8"


@pytest.mark.parametrize(
    ("own", "others", "line"),
    [
        (None, 0, "attention flex: agrees with sdpa on this machine"),
        ("no compiler", 0, "attention sdpa instead of flex: no compiler"),
        (None, 1, "attention sdpa instead of flex: it fails in another process"),
        ("no compiler", 1, "attention sdpa instead of flex: no compiler"),
    ],
)
def test_all_ranks_do_the_same(
    own: str | None, others: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of each rank is one voice; only an agreement of all is flex."""

    class OneOfTwo:
        dtype, device = torch.float32, CPU
        autocast = torch.no_grad
        asked = 0

        def reduce_max(self, values: list[int]) -> list[int]:
            self.asked += 1
            return [max(values[0], others)]

    model = tiny.make_model(0).requires_grad_(False)
    monkeypatch.setattr(flex_probe, "probe", lambda *_: own)
    engine: Any = OneOfTwo()
    options = Options.parse(["--dataset", "x", "--model-config", "x", "--attention", "flex"])
    attention, lines = setup._choose_attention(options, model, engine)
    assert (attention == "flex") == (own is None and not others)
    assert lines == [line]
    assert engine.asked == 1
