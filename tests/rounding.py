"""Bounds between two correct computations, measured instead of guessed.

Two correct computations of the same thing in fp32 differ: they add in a different order, and
kernels for other CPUs (SSE, AVX2, AVX-512) round differently. The difference depends on the machine
and on the problem: Adam divides small gradients by their own size, so that the rounding of a
gradient that nearly cancels reaches the weights undiminished. No constant is right everywhere. What
can be measured everywhere is how far a computation is from the exact result:

1. The exact result x comes from the same code in double precision (`double_precision`), whose own
   rounding is 5e8 times smaller.
2. A trusted computation (one process, PyTorch's own gradients) has an error |t - x|. It is one
   sample of what rounding does here. More samples come from weights whose last bit is random
   (`nudge`): their runs round differently, and also differ by eps times the problem's condition.
3. The tested computation y is correct if its error is one more such sample:
   |y - x| <= MARGIN * max |t_i - x|. It follows that two of them differ by at most
   (MARGIN + 1) times the trusted error.

MARGIN: where a single value decides the error, samples are normally distributed, the worst case.
The largest of three then falls below 1/8 of the next one in 0.2 % of cases; where the error has
many independent parts, practically never. A mistake in a formula is larger by orders of magnitude:
the bounds are about 1e-6 of the losses. FLOOR applies where the trusted result is exact by chance:
n additions in random order err by sqrt(n) * eps / 2, and the sums here have at most a few thousand
terms.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

EPS = torch.finfo(torch.float32).eps
MARGIN = 8.0
FLOOR = 16 * EPS
# The largest error allowed in double precision. It is 4.5e5 * eps, as 5e-2 would be in fp32: enough
# for any condition, and far below what a mistake changes.
DOUBLE = 1e-10

Module = TypeVar("Module", bound=nn.Module)
Named = Mapping[str, torch.Tensor]

_aten = torch.ops.aten
# Random numbers are drawn in fp32, so that both precisions get the same ones.
_FILLING = {_aten.uniform_.default, _aten.normal_.default, _aten.bernoulli_.float}
_MAKING = {_aten.randn.default, _aten.randn.generator, _aten.rand.default, _aten.rand.generator}


class _Double(TorchDispatchMode):
    """Replaces fp32 with double wherever it is requested, also within a backward pass."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING and args[0].dtype == torch.float64:
            values = torch.empty_like(args[0], dtype=torch.float32)
            return args[0].copy_(func(values, *args[1:], **kwargs))
        if func in _MAKING:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Makes code that computes in fp32 compute in double; the models must be double too."""
    before, load = torch.get_default_dtype(), torch.load

    def load_as_stored(*args: Any, **kwargs: Any) -> Any:
        with as_written():
            return load(*args, **kwargs)

    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch, _Double():
            patch.setattr(torch, "load", load_as_stored)
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Within `double_precision`, makes fp32 fp32 again; what has double inputs stays double."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with _disable_current_modes():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def nudge(tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    """Move the last bit of each fp32 value up, down or not at all, by chance."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        if tensor.dtype != torch.float32:  # codes of quantized weights
            continue
        # Zeros stay: a LoRA's B has to begin with them.
        steps = torch.randint(-1, 2, tensor.shape, generator=generator) * (tensor != 0)
        towards = torch.where(steps == 0, tensor, steps * math.inf)
        tensor.copy_(torch.nextafter(tensor, towards))


def relative_error(actual: Any, exact: Any, scale: Any = None) -> float:
    """Returns the relative error of a tensor, or the root mean square of those of numbers.

    Args:
        scale: what the differences of tensors are compared with; None: the exact values.
    """
    if isinstance(exact, torch.Tensor):
        size = (exact if scale is None else scale).double().norm()
        return float((actual.double() - exact.double()).norm() / size)
    errors = [(a - x) / x for a, x in zip(actual, exact, strict=True)]
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def bound(trusted: Sequence[Any], exact: Any, scale: Any = None) -> float:
    """Returns the largest error of a correct computation, given some that are trusted."""
    return MARGIN * max(FLOOR / MARGIN, *(relative_error(t, exact, scale) for t in trusted), 0.0)


def assert_as_exact(
    actual: Any, trusted: Sequence[Any], exact: Any, what: str, scale: Any = None
) -> None:
    """Assert that `actual` is as near to the exact result as `trusted`, up to `MARGIN`."""
    error, allowed = relative_error(actual, exact, scale), bound(trusted, exact, scale)
    assert error <= allowed, f"{what}: {error:.1e} from the exact result, {allowed:.1e} allowed"


def joined(tensors: Named, like: Named) -> torch.Tensor:
    """Returns all values in double, each tensor divided by the norm of its namesake in `like`.

    A smaller norm than a thousandth of the largest is raised to that.
    """
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in like.items()}
    norms = {name: float(tensor.detach().double().norm()) for name, tensor in like.items()}
    least = 1e-3 * max(norms.values())
    assert least > 0, "nothing but zeros is compared"
    parts = [t.detach().double().flatten() / max(norms[n], least) for n, t in tensors.items()]
    return torch.cat(parts)


def assert_same(
    module: Module, tested: Callable[[Module], Named], trusted: Callable[[Module], Named]
) -> None:
    """Assert that two ways to compute with an fp32 module agree.

    They must be equal in double precision, and equally exact in fp32. Each gets copies of the
    module and returns tensors by name.
    """
    double = copy.deepcopy(module).double()
    with double_precision():
        exact = trusted(copy.deepcopy(double))
        same = tested(double)
    assert all(t.dtype == torch.float64 for t in (*exact.values(), *same.values()))
    x = joined(exact, exact)
    error = float((joined(same, exact) - x).norm() / x.norm())
    assert error <= DOUBLE, f"in double precision: {error:.1e} apart"
    samples = []
    for seed in (None, 1, 2):
        nudged = copy.deepcopy(module)
        if seed is not None:
            nudge(dict(nudged.named_parameters()), seed)
        samples.append(joined(trusted(nudged), exact))
    actual = joined(tested(copy.deepcopy(module)), exact)
    assert_as_exact(actual, samples, x, "in fp32")
