"""Merges deltas into their base model, tensor by tensor, and checks the result.

    W' = W + sqrt(dim_in) * sum of weight * (alpha / r) * B A        (docs/format.md §7)

The sum is made in double precision, a few rows at a time, and rounded to the type of W (of 16 bits
by way of fp32). All else is copied. Only the tensor at hand and the deltas are in memory.

The check has two parts. The file must hold the computed values, bit for bit. And the logits of a
small record, in double precision, must be those of the base with its deltas beside it (the
reference), up to the rounding of the merged weights. How far that rounding may carry the logits is
measured, not guessed: another run has the same sums rounded *at random*, up or down with equal
probability. Where neighbouring values of the type are s apart, a sum rounded to the nearest is off
by s²/12 in the mean square, and the sum rounded at random differs from it by s²/2 (by s in half of
the cases). Errors of many weights are independent, and small enough for their effects to add up. So
the logits of both roundings lie sqrt(6) = 2.4 times as far from each other as the merged ones
should lie from the reference, in the root mean square. Both distances are samples: with `_MARGIN`
times the first, up to 10 times the expected error passes. A mistake in a formula, a name or a
factor is larger by orders of magnitude, unless the delta itself is lost in rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpm_bee.checkpoint.convert import SourceModel
from cpm_bee.checkpoint.loading import drop_pages
from cpm_bee.checkpoint.model_folder import check_output
from cpm_bee.checkpoint.options import AUTO, MergeOptions
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.streamed_logits import probe_batch, streamed_logits
from cpm_bee.delta import DeltaFile, LoRA
from cpm_bee.errors import InputError, Problems, RunError
from cpm_bee.files import atomic_folder
from cpm_bee.model.layers import Linear
from cpm_bee.progress import progress_bar

logger = logging.getLogger(__name__)

# Rounds values in double precision to a type.
Rounding = Callable[[torch.Tensor, torch.dtype], torch.Tensor]

_WEIGHT = ".weight"
_PIECE = 1 << 20  # values that are in double precision at once
_MARGIN = 4.0
# Where all sums are exact, the runs differ only where double precision crosses a boundary of fp32,
# in which norms work.
_FLOOR = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how far the logits are from those of base and deltas.

    Attributes:
        num_layers: the Linears that were changed.
        num_tokens: the length of the record that was tried.
        error: the distance of the logits, relative to their norm.
        allowed: the largest distance that rounding explains.
        dtypes: the types of the changed weights.
    """

    num_layers: int
    num_tokens: int
    error: float
    allowed: float
    dtypes: str


def merge(options: MergeOptions) -> MergeReport:
    """Run a merge.

    Raises:
        InputError: base, deltas and output do not go together.
        RunError: the merged model does not compute what base and deltas do; it is not kept.
    """
    output = Path(options.output)
    deltas = [delta.path for delta in options.delta]
    check_output(output, (options.load, options.vocab, *deltas), overwrite=options.overwrite)
    source = SourceModel.open(options.load, options.vocab)
    read = (source.checkpoint.path, source.pretrained.tokenizer.source)
    check_output(output, read, overwrite=options.overwrite)
    loras = _insert_deltas(source, options)
    with atomic_folder(output, replace=options.overwrite) as folder:
        form = source.form if options.to == AUTO else options.to
        target = source.folder(form, options.shard_size)
        target.write(folder, _merged_values(source, loras))
        return _verified(source, loras, Checkpoint(folder))


class _Sum(nn.Module):
    """The low-rank paths of several deltas at one Linear; `scale` of each has its weight."""

    def __init__(self, loras: list[LoRA]) -> None:
        super().__init__()
        self.loras = nn.ModuleList(loras)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([lora(x) for lora in self.loras]).sum(dim=0)


def _insert_deltas(source: SourceModel, options: MergeOptions) -> dict[str, list[LoRA]]:
    """Insert the sum of all deltas; returns the parts by the name of their Linear."""
    model = source.pretrained.model
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    loras: dict[str, list[LoRA]] = {}
    problems = Problems()
    for given in options.delta:
        with problems.collecting():
            file = DeltaFile.read(given.path, alpha=options.delta_alpha)
            file.check_base(*source.fingerprints)
            file.insert_into(model)
            for name, linear in linears.items():
                if linear.lora is not None:
                    linear.lora.scale *= given.weight
                    loras.setdefault(name, []).append(linear.lora.double())
    problems.raise_if_any("these deltas cannot be merged:")
    for name, linear in linears.items():
        linear.lora = _Sum(loras[name]) if name in loras else None
    return loras


def _merged_values(
    source: SourceModel, loras: dict[str, list[LoRA]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, entry in source.entries.items():
        value = entry.read()
        own = loras.get(name.removesuffix(_WEIGHT))
        if own is None:
            yield name, value
        else:
            merged = merged_weight(value, own, to_nearest)
            if not merged.isfinite().all():
                raise InputError(
                    f"{source.checkpoint.path}: {name} would have values after merging that are "
                    f"not finite, or too large for {_name(value.dtype)}"
                )
            yield name, merged
        drop_pages(value)


def merged_weight(weight: torch.Tensor, loras: list[LoRA], rounding: Rounding) -> torch.Tensor:
    """The weight of a Linear with low-rank paths merged into it, in the type of `weight`.

    Args:
        loras: the paths, in double precision.
    """
    dim_out, dim_in = weight.shape
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    parts = [
        (lora.lora_B.detach(), lora.lora_A.detach(), lora.scale * math.sqrt(dim_in))
        for lora in loras
    ]
    step = max(1, _PIECE // dim_in)
    for begin in range(0, dim_out, step):
        rows = slice(begin, begin + step)
        total = weight[rows].double()
        for b, a, factor in parts:
            total.addmm_(b[rows], a, alpha=factor)
        result[rows] = rounding(total, weight.dtype)
    return result


def to_nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype)


def at_random(
    values: torch.Tensor, dtype: torch.dtype, *, generator: torch.Generator
) -> torch.Tensor:
    """Round up or down with equal probability; values of the type stay as they are."""
    nearest = values.to(dtype).double()
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(nearest)  # 2**(exponent - 1) <= |nearest| < 2**exponent
    spacing = torch.ldexp(torch.full_like(nearest, info.eps), exponent - 1)
    spacing.clamp_(min=info.tiny * info.eps)
    flipped = torch.rand(values.shape, generator=generator) < 0.5
    return (nearest + flipped * torch.sign(values - nearest) * spacing).to(dtype)


def _verified(source: SourceModel, loras: dict[str, list[LoRA]], merged: Checkpoint) -> MergeReport:
    """Compare the merged model with what was computed, and with base and deltas.

    Raises:
        RunError: its values are others, or the logits differ by more than rounding explains.
        InputError: the logits of base and deltas are not finite.
    """
    model = source.pretrained.model
    batch = probe_batch(source.pretrained.tokenizer)
    entries = source.entries
    rounding: Any = partial(at_random, generator=torch.Generator().manual_seed(0))

    def read_rounded_at_random(name: str) -> torch.Tensor:
        value, own = entries[name].read(), loras.get(name.removesuffix(_WEIGHT), [])
        expected = merged_weight(value, own, to_nearest) if own else value
        written = merged.entries[name].read()
        if not _same_bits(expected, written):
            raise RunError(f"{name} was not written as it was computed, so nothing was kept")
        drop_pages(written)
        if not own:
            return value
        sample = merged_weight(value, own, rounding)
        drop_pages(value)
        return sample

    with progress_bar(total=3, description="checking the result", unit="runs") as bar:
        reference = streamed_logits(model, batch, lambda name: entries[name].read())
        bar.update()
        for module in model.modules():
            if isinstance(module, Linear):
                module.lora = None
        sample = streamed_logits(model, batch, read_rounded_at_random)
        bar.update()
        found = streamed_logits(model, batch, lambda name: merged.entries[name].read())
        bar.update()
    if not reference.isfinite().all():
        raise InputError(f"{source.checkpoint.path}: base and deltas give no finite logits")
    size = reference.norm().item()
    error = (found - reference).norm().item() / size
    allowed = max(_MARGIN * (sample - found).norm().item() / size, _FLOOR)
    names = sorted({_name(entries[name + _WEIGHT].dtype) for name in loras})
    report = MergeReport(len(loras), batch.num_tokens, error, allowed, ", ".join(names))
    if not error <= allowed:  # also if it is not a number
        raise RunError(
            f"the merged model does not compute what base and deltas do, so nothing was kept: "
            f"on a record of {report.num_tokens} tokens the logits differ by {error:.1e} of their "
            f"size, and rounding to {report.dtypes} explains {allowed:.1e}"
        )
    return report


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
