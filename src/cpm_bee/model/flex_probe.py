"""Tries FlexAttention with a model's heads on this machine before a run relies on it.

Its kernels are compiled here, for this GPU. Whether that works shows only by trying: the C compiler
may be missing, a head may not fit the kernel, the compiler may fail, and the numbers may be wrong.
`probe` attends over three records, of more than two blocks of 128 tokens, of one token more than a
block, and of less than one, and compares output and gradients with those of SDPA. In the first one
a segment does not see another, as with in-context samples.

The bound: let u be half the eps of the compute type. Both kernels read the same values, multiply
them exactly and add in fp32. What they round to the compute type is, forward, the weights of the
softmax and the output; in the backward pass, the weights, the gradients of the scores, the output
(whose product with its gradient is subtracted) and the result. Each of these up to 4 roundings
moves a row by up to u of its norm, as the errors of its terms are independent. Where SDPA has no
fused kernel, it also rounds the scores, which are below 8 here: once more, up to 8 u. Two results
may thus differ by 2 * 4 u + 8 u = 8 eps. The fp32 sums add an fp32 eps for each of their terms, of
which there are at most as many as tokens in a record. (Measured on a CPU, with FlexAttention's
plain form: up to 1.4 eps with 8 heads of 64, 4.6 eps in fp16 with 32 heads of 128.)

Errors are taken row by row (one token, one head), relative to the norm of the row or to a typical
one, whichever is larger: a row that cancels is all rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpm_bee.data.batch import Batch
from cpm_bee.model import flex_attention
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import AttentionFunction
from cpm_bee.segments import HIDDEN

LENGTHS = (300, 129, 40)
_SEGMENTS = 3  # of each record, of equal size; the last one is predicted
_LEAST_DIM_HEAD = 16  # of the kernels' matrix products
_LONGEST_MESSAGE = 200


def probe(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: Callable[..., AttentionFunction] | None = None,
) -> str | None:
    """Returns why FlexAttention cannot be used with a model's heads; None if it agrees with SDPA.

    The bias table is frozen, as in delta tuning. What is compiled here is used again in training.

    Args:
        dtype: of q, k, v and the bias table.
        attention: what to try instead of `FlexAttention`.
    """
    if attention is None:
        if reason := flex_attention.unavailable_reason(device, 0.0):
            return reason
        attention = flex_attention.FlexAttention
    if config.dim_head < _LEAST_DIM_HEAD:
        return f"its kernels need dim_head {_LEAST_DIM_HEAD} or more, not {config.dim_head}"
    generator = torch.Generator().manual_seed(0)
    bias = PositionBias(config)
    torch.nn.init.normal_(bias.relative_attention_bias, generator=generator)
    bias = bias.to(device, dtype).requires_grad_(False)
    batch = _batch(config).to(device)
    for at_targets in (False, True):
        case = _Case.random(config, batch, at_targets, dtype, generator)
        groups = PaddedGroups.of(batch, bias, at_targets=at_targets)
        wanted = case.results(PaddedAttention(groups, bias, dtype, 0.0))
        try:
            actual = case.results(attention(batch, bias, at_targets=at_targets))
        except Exception as error:  # whatever the compiler raises
            return f"it fails here: {_one_line(error)}"
        for name, value in wanted.items():
            error_found, allowed = _error(actual[name], value), bound(dtype)
            if not error_found <= allowed:  # also if it is NaN
                return (
                    f"its {name} differs from that of sdpa by {error_found:.1e} "
                    f"({allowed:.1e} allowed)"
                )
    return None


def bound(dtype: torch.dtype) -> float:
    """Returns the largest relative difference of a row in two correct results (see above)."""
    return 8 * torch.finfo(dtype).eps + max(LENGTHS) * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Case:
    """Inputs of one call, and the gradient of its output."""

    q: torch.Tensor  # (N, H, D)
    k: torch.Tensor  # (T, H, D)
    v: torch.Tensor  # (T, H, D)
    gradient: torch.Tensor  # (N, H, D)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        batch: Batch,
        at_targets: bool,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> _Case:
        n = batch.num_targets if at_targets else batch.num_tokens
        heads = (config.num_heads, config.dim_head)
        made = [
            torch.randn(size, *heads, generator=generator).to(batch.ids.device, dtype)
            for size in (n, batch.num_tokens, batch.num_tokens, n)
        ]
        return cls(*made)

    def results(self, attend: AttentionFunction) -> dict[str, torch.Tensor]:
        """The output [N, H, D], and the gradients of q, k and v."""
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        with torch.enable_grad():
            output = attend(0, *inputs)
        gradients = torch.autograd.grad(output, inputs, self.gradient)
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        return dict(zip(names, (output.detach(), *gradients), strict=True))


def _batch(config: ModelConfig) -> Batch:
    """Records of three segments, on the CPU; the last segment is predicted and has the targets."""
    segments = torch.cat([torch.arange(length) * _SEGMENTS // length for length in LENGTHS])
    # A segment's relation with itself is 0; all others differ, as far as the table has rows.
    relations = 1 + torch.arange(_SEGMENTS**2) % min(255, config.position_bias_num_segment_buckets)
    relations[:: _SEGMENTS + 1] = 0
    relations = relations.to(torch.uint8).repeat(len(LENGTHS))
    relations[_SEGMENTS] = HIDDEN  # the first segment, to the second one
    targets = torch.nonzero(segments == _SEGMENTS - 1).squeeze(1)
    records = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    nothing = torch.zeros_like(segments)
    return Batch(
        ids=nothing,
        subs=nothing,
        segments=segments,
        context=segments < _SEGMENTS - 1,
        lengths=LENGTHS,
        num_segments=(_SEGMENTS,) * len(LENGTHS),
        relations=relations,
        target_positions=targets,
        targets=nothing[targets],
        target_records=records[targets],
        extension_ids=nothing[:0],
        extension_subs=nothing[:0],
        has_samples=True,
    )


def _error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest relative error of a row; NaN if there is one."""
    actual, wanted = actual.double(), wanted.double()
    norms = wanted.norm(dim=-1)
    typical = norms.square().mean().sqrt()
    return float(((actual - wanted).norm(dim=-1) / norms.clamp(min=typical)).max())


def _one_line(error: Exception) -> str:
    """Returns the line of an error's message that says most.

    The compiler works in other processes; the message of an error there is a whole traceback, whose
    last error is the reason. Otherwise the first line is.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines[1:] if re.match(r"[\w.]*(Error|Exception): ", line)]
    text = reasons[-1] if reasons else ": ".join([type(error).__name__, *lines[:1]])
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"
