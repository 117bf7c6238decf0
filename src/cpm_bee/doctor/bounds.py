"""How far two correct computations may be apart: measured on this machine, not guessed.

Two correct computations in one dtype differ, because they add in different orders. No constant
bounds that everywhere, but how far a trusted computation is from the exact result can be measured:

1. The exact result x comes from the same code in double precision, on the CPU.
2. Trusted computations t in the dtype itself, by plain PyTorch, have errors |t - x|. There are
   several: with the weights as they are, and with the last bit of each weight moved by chance.
3. The tested computation y is correct if its error is one more of this kind:
   |y - x| <= MARGIN * max |t - x|. Where the trusted results are exact by chance, 16 roundings of
   fp32 are allowed, as sums of some thousand terms need, and one of a 16-bit type, whose sums are
   computed in fp32.

A mistake in a kernel is larger by orders of magnitude. Errors are relative to the norm of x.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpm_bee.doctor.report import FAULT, OK

MARGIN = 8.0
# Tensors with a smaller norm than this share of the largest are measured by that.
_LEAST_SHARE = 1e-3

Named = Mapping[str, torch.Tensor]


class Line(NamedTuple):
    """One thing that a step has checked."""

    what: str
    verdict: str
    text: str  # what was measured, and what is allowed


def judge_exact(what: str, is_right: bool, text: str) -> Line:
    return Line(what, OK if is_right else FAULT, text)


def judge(
    what: str, actual: Named, trusted: Sequence[Named], exact: Named, dtype: torch.dtype
) -> Line:
    """Judge a computation by its distance from the exact result; see the module.

    Args:
        actual, trusted, exact: tensors by name; each is compared relative to its own size.
        dtype: the type of the computation, whose rounding is the least that is allowed.
    """
    if actual.keys() != exact.keys():
        return Line(what, FAULT, f"has {sorted(actual)}, expected {sorted(exact)}")
    if broken := [name for name, t in actual.items() if not torch.isfinite(t).all()]:
        return Line(what, FAULT, f"not finite: {', '.join(broken[:3])}")
    x = _joined(exact, exact)
    error = float((_joined(actual, exact) - x).norm() / x.norm())
    errors = [float((_joined(t, exact) - x).norm() / x.norm()) for t in trusted]
    measured = max(errors)
    eps = torch.finfo(dtype).eps
    allowed = max(16 * eps if dtype == torch.float32 else eps, MARGIN * measured)
    # A trusted computation that is itself worthless would allow anything.
    is_right = all(map(math.isfinite, errors)) and allowed < 1 and error <= allowed
    name = str(dtype).removeprefix("torch.")
    text = f"error {error:.1e}, allowed {allowed:.1e} (of {name} here: {measured:.1e})"
    return judge_exact(what, is_right, text)


def judge_equal(what: str, actual: Named, expected: Named) -> Line:
    """Judge a computation that has to give the same bits."""
    if actual.keys() != expected.keys():
        return Line(what, FAULT, f"has {sorted(actual)}, expected {sorted(expected)}")
    different = [n for n, t in expected.items() if not _same_bits(t.cpu(), actual[n].cpu())]
    text = f"{len(expected)} tensors, bit for bit"
    if different:
        text = f"other bits in {', '.join(different[:3])} ({len(different)} of {len(expected)})"
    return judge_exact(what, not different, text)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _joined(tensors: Named, like: Named) -> torch.Tensor:
    """All values in double, each tensor divided by the norm of its namesake in `like`."""
    norms = {name: float(t.detach().double().norm()) for name, t in like.items()}
    least = _LEAST_SHARE * max(norms.values()) or 1.0
    parts = [
        tensors[n].detach().double().cpu().flatten() / max(norms[n], least) for n in sorted(like)
    ]
    return torch.cat(parts)


@torch.no_grad()
def nudge(tensors: Named, seed: int) -> None:
    """Move the last bit of each floating-point value up, down or not at all, by chance."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            steps = torch.randint(-1, 2, tensor.shape, generator=generator)
            eps = torch.finfo(tensor.dtype).eps
            tensor.add_(tensor.abs() * (steps * eps).to(tensor.dtype).to(tensor.device))


class _Double(TorchDispatchMode):
    """Replaces fp32 with double wherever code asks for it, also in a backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {name: _wide(value) for name, value in kwargs.items()}
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Makes code that computes in fp32 compute in double; its model has to be double too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)
