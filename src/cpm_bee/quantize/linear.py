"""A Linear whose frozen weight is stored in 4 or 8 bit, and models with such layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cpm_bee.errors import InputError, Problems
from cpm_bee.model.layers import Linear
from cpm_bee.quantize import kernels
from cpm_bee.quantize.formats import NF4, Format, row_chunks

# The number of values of W per piece on a CPU. Tensors larger than 32 MiB get new pages from the
# kernel each time they are allocated, which takes longer than the arithmetic.
_CHUNK = 1 << 21
# Up to this number of rows, a CUDA kernel that multiplies by codes directly is faster.
_FEW_ROWS = 16


class QuantizedLinear(Linear):
    """A Linear with `codes` and `absmax` instead of W, which is dequantized piece by piece.

    Both are parameters without gradient: they move to a device and are sharded like others.
    `absmax` must stay fp32 (no `model.to(dtype)`).

    Raises:
        InputError: the format does not support a matrix of this size.
    """

    # Its autograd function works piece by piece, into parts of one tensor.
    is_traceable = False

    def __init__(self, dim_in: int, dim_out: int, fmt: Format) -> None:
        with torch.device("meta"):
            super().__init__(dim_in, dim_out)
        del self.weight
        self.format = fmt
        codes_size, absmax_size = fmt.sizes(dim_out, dim_in)
        self.codes = _frozen(torch.empty(codes_size, dtype=fmt.codes_dtype, device="meta"))
        self.absmax = _frozen(torch.empty(absmax_size, device="meta"))

    @classmethod
    def of(cls, linear: Linear, fmt: Format) -> QuantizedLinear:
        """Quantize a Linear that has values; keeps its LoRA."""
        result = cls(linear.dim_in, linear.dim_out, fmt)
        codes, absmax = fmt.quantize(linear.weight.detach().cpu())
        device = linear.weight.device
        result.codes, result.absmax = _frozen(codes.to(device)), _frozen(absmax.to(device))
        result.lora = linear.lora
        return result.train(linear.training)

    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.absmax

    def dense(self, operands: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        codes, absmax = operands
        return self.format.dense(codes, absmax, dtype)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self._has_kernel(x):
            return kernels.product(x, self.codes, self.absmax)
        return _Product.apply(x, self, *self.operands())

    def _has_kernel(self, x: torch.Tensor) -> bool:
        return (
            x.device.type == "cuda"
            and not (torch.is_grad_enabled() and x.requires_grad)
            and x.numel() <= _FEW_ROWS * self.dim_in
            and isinstance(self.format, NF4)
            and kernels.available(x.device, x.dtype)
        )

    def pieces(
        self, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields W in pieces, (rows, values); in one piece on a GPU."""
        device = operands[0].device.type
        chunk = _CHUNK if device == "cpu" else self.dim_in * self.dim_out
        for rows in row_chunks(self.dim_out, self.dim_in, chunk):
            yield rows, self.dense(tuple(o[rows] for o in operands), dtype)

    def extra_repr(self) -> str:
        return f"{self.dim_in} -> {self.dim_out}, {self.format.name}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x Wᵀ; saves only the operands of W and dequantizes W again for the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: QuantizedLinear, *operands: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*operands)
        flat = x.reshape(-1, layer.dim_in)  # (N, dim_in)
        y = flat.new_empty(len(flat), layer.dim_out)
        for rows, weight in layer.pieces(operands, x.dtype):
            torch.mm(flat, weight.mT, out=y[:, rows])
        return y.view(*x.shape[:-1], layer.dim_out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: QuantizedLinear = ctx.layer
        operands = ctx.saved_tensors
        flat = gradient.reshape(-1, layer.dim_out)  # (N, dim_out)
        of_x = flat.new_zeros(len(flat), layer.dim_in)
        for rows, weight in layer.pieces(operands, gradient.dtype):
            of_x.addmm_(flat[:, rows], weight)
        return (of_x.view(*gradient.shape[:-1], layer.dim_in), None, *(None for _ in operands))


def quantize_(model: nn.Module, fmt: Format) -> None:
    """Quantize each Linear of a model that has values, in place.

    Raises:
        InputError: the format does not support the sizes of some layers; each kind is listed once.
    """
    _replace(model, fmt, lambda linear: QuantizedLinear.of(linear, fmt))


def insert_quantized_linears(model: nn.Module, fmt: Format) -> None:
    """Replace each Linear of a model by a QuantizedLinear without values.

    Raises:
        InputError: see `quantize_`.
    """
    _replace(model, fmt, lambda linear: QuantizedLinear(linear.dim_in, linear.dim_out, fmt))


def _replace(model: nn.Module, fmt: Format, make: Callable[[Linear], QuantizedLinear]) -> None:
    linears = {name: m for name, m in model.named_modules() if type(m) is Linear}
    problems = Problems()
    refused = set()
    for name, linear in linears.items():
        kind = name.rpartition(".")[2]
        try:
            fmt.sizes(linear.dim_out, linear.dim_in)
        except InputError as error:
            if kind not in refused:
                problems.add(kind, str(error))
            refused.add(kind)
    problems.raise_if_any(f"--quantize {fmt.name} does not fit this model:")
    for name, linear in linears.items():
        model.set_submodule(name, make(linear))


def num_weights(model: nn.Module) -> int:
    """The number of a model's parameters before quantization."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            total += layer.dim_in * layer.dim_out - sum(o.numel() for o in layer.operands())
    return total
