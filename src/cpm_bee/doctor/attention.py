"""Step `sdpa` of `doctor.py --gpu`: the attention kernels against the formula they stand for.

The tested computation is the product's own `PaddedAttention`, with whatever kernel PyTorch chooses
for it. The formula, softmax(q kᵀ / sqrt(D) + bias) v, is written out here, record by record.

Two cases: records of odd lengths, and length 192 (length % 128 == 64) with scores around -1,000,
for which NaN gradients of cuDNN's kernel have been reported. The bias is frozen, as with a LoRA, or
trained, as in full fine-tuning.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cpm_bee.data.batch import Batch
from cpm_bee.doctor.bounds import Named, judge, nudge
from cpm_bee.doctor.child import Context
from cpm_bee.doctor.workload import make_config
from cpm_bee.model.attention import PaddedAttention, PaddedGroups, PositionBias
from cpm_bee.train.memory_estimate import typical_batch

_CASES = {"odd lengths": (1, 7, 63, 129, 257), "length 192, scores near -1,000": (192, 192, 190)}
_BIAS, _PRODUCT = -1024.0, -40.0  # of the scores near -1,000; the first is exact in every dtype
_TARGETS = 5  # the last tokens of each record are predicted, and see no later ones


class _Inputs(NamedTuple):
    q: torch.Tensor  # (T, H, D), as are k, v and gradient
    k: torch.Tensor
    v: torch.Tensor
    gradient: torch.Tensor  # of the output
    table: torch.Tensor  # (rows, H), the bias

    def to(self, device: torch.device, dtype: torch.dtype) -> _Inputs:
        return _Inputs(*(t.to(device, dtype) for t in self))


def sdpa(context: Context) -> None:
    config = make_config(context.device)
    bias = PositionBias(config)
    heads, dim_head = config.num_heads, (config.dim_head if context.on_cpu else 128)
    for case, lengths in _CASES.items():
        batch = typical_batch(lengths, _TARGETS, config.vocab_size)
        negative = "near" in case
        inputs = _inputs(batch, heads, dim_head, bias.num_rows, negative)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rounded = inputs.to(torch.device("cpu"), dtype)
            for trained in (False, True):
                name = str(dtype).removeprefix("torch.")
                what = f"{case}, {name}, bias {'trained' if trained else 'frozen'}"
                exact = _formula(bias, batch, rounded.to(torch.device("cpu"), torch.float64))
                on_device = rounded.to(context.device, dtype)
                trusted = [_formula(bias, batch, on_device)]
                # In 16 bit the last bit of q and k would move scores of -1,000 by several units.
                for seed in (1, 2) if dtype == torch.float32 else ():
                    nudged = _Inputs(*(t.clone() for t in on_device))
                    nudge(nudged._asdict(), seed)
                    trusted.append(_formula(bias, batch, nudged))
                actual = _product(bias, batch, on_device, trained=trained)
                if not trained:
                    for named in (exact, *trusted):
                        named.pop("table", None)
                context.add(judge(what, actual, trusted, exact, dtype))


def _inputs(batch: Batch, heads: int, dim_head: int, rows: int, negative: bool) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (batch.num_tokens, heads, dim_head)
    q, k, v, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    table = torch.randn(rows, heads, generator=generator)
    if negative:
        # q and k have a part in common, with opposite signs: q kᵀ / sqrt(D) is near -40.
        common = math.sqrt(-_PRODUCT / math.sqrt(dim_head))
        q, k, table = 0.3 * q + common, 0.3 * k - common, torch.full_like(table, _BIAS)
    return _Inputs(q, k, v, gradient, table)


def _product(bias: PositionBias, batch: Batch, inputs: _Inputs, *, trained: bool) -> dict:
    """Output and gradients of the product's attention, by name."""
    device, dtype = inputs.q.device, inputs.q.dtype
    batch = batch.to(device)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs._asdict().items()}
    table = leaves["table"].requires_grad_(trained)
    own = _with_table(bias, table)
    leaves["table"] = own.relative_attention_bias
    groups = PaddedGroups.of(batch, own)
    attend = PaddedAttention(groups, own, dtype, 0.0)
    output = attend(0, leaves["q"], leaves["k"], leaves["v"])
    return _results(output, leaves, inputs.gradient)


def _formula(bias: PositionBias, batch: Batch, inputs: _Inputs) -> dict:
    """The same by the formula, record by record, with PyTorch's basic operations.

    In 16 bit it rounds where fused kernels round: scores and softmax are computed in fp32, and both
    the probabilities and the gradients of the scores are rounded for the next product.
    """
    dtype = inputs.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs._asdict().items()}
    device = inputs.q.device
    outputs, begin = [], 0
    masked = leaves["table"].new_full((1, leaves["table"].shape[1]), float("-inf"))
    table = torch.cat([leaves["table"], masked])
    for length in batch.lengths:
        record = typical_batch([length], _TARGETS, batch.num_tokens)
        rows = PaddedGroups.of(record, bias).rows[0][0].to(device)  # (L, L)
        part = slice(begin, begin + length)
        begin += length
        q, k, v = (leaves[n][part].transpose(0, 1) for n in ("q", "k", "v"))  # (H, L, D)
        own = F.embedding(rows, table).permute(2, 0, 1)
        scores = q.to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1]) + own
        scores.register_hook(lambda g: g.to(dtype).to(wide))
        outputs.append((scores.softmax(dim=-1).to(dtype) @ v).transpose(0, 1))
    return _results(torch.cat(outputs), leaves, inputs.gradient)


def _results(output: torch.Tensor, leaves: Named, gradient: torch.Tensor) -> dict:
    output.backward(gradient)
    found = {"output": output.detach()}
    for name in ("q", "k", "v", "table"):
        if (own := leaves[name].grad) is not None:
            found[name] = own
    return found


def _with_table(bias: PositionBias, table: torch.Tensor) -> PositionBias:
    """The same bias with another table, which may be the leaf of a graph."""
    own = PositionBias.__new__(PositionBias)
    torch.nn.Module.__init__(own)
    own.__dict__.update({n: v for n, v in bias.__dict__.items() if not n.startswith("_")})
    own.relative_attention_bias = torch.nn.Parameter(table.detach(), table.requires_grad)
    return own
