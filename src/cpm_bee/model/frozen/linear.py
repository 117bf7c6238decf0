"""A frozen Linear with LoRA: products with W' and their gradients.

A Linear with LoRA multiplies by W' = W + k B A, where k = alpha/rank * sqrt(dim_in): the layer
divides the whole product by sqrt(dim_in), but LoRA is not divided (docs/format.md §7). The methods
leave out the factor 1/sqrt(dim_in) unless they say otherwise; callers fold it into other factors
(`model/frozen/halves.py`).

In fp32, B A is added to a piece of W, so that one product computes both. In 16 bit this would round
away small updates of B A, so the two low-rank products are computed separately. W comes in pieces
(`Linear.pieces`): a quantized W is dequantized piece by piece, in the forward pass and again in the
backward pass, and never exists as a whole.

Only the operands of W and LoRA are kept. With y = x W'ᵀ the gradients are

    of x: gy W'        of A: k (gy B)ᵀ x        of B: k gyᵀ (x Aᵀ)        of W: none, it is frozen

Hazard: `x` for the gradients must be the input of `forward`, so callers recompute it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cpm_bee.model.frozen.buffers import buffer_pool
from cpm_bee.model.layers import RESIDUAL_SCALE, Linear


class FrozenLinear(NamedTuple):
    """A Linear with the tensors it uses in one pass: the operands of W, and LoRA."""

    linear: Linear
    operands: tuple[torch.Tensor, ...]
    lora: tuple[torch.Tensor, ...]  # (A, B) or nothing

    @staticmethod
    def lora_of(linear: Linear) -> tuple[torch.Tensor, ...]:
        return () if linear.lora is None else (linear.lora.lora_A, linear.lora.lora_B)

    @property
    def _factor(self) -> float:
        # The product is divided by sqrt(dim_in) later, but B A must not be (docs/format.md §7).
        assert self.linear.lora is not None
        return self.linear.lora.scale / self.linear.scale

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields (rows, values [rows, dim_in]) of W' in fp32, of W in other dtypes."""
        for rows, weight in self.linear.pieces(self.operands, dtype):
            if self._merges(dtype):
                a, b = self.lora
                weight = torch.addmm(weight, b[rows], a, alpha=self._factor)
            yield rows, weight

    def _merges(self, dtype: torch.dtype) -> bool:
        # In 16 bit, adding to W would round away small updates.
        return bool(self.lora) and dtype == torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, dim_in], already divided by sqrt(dim_in) -> x W'ᵀ [T, dim_out]."""
        y = buffer_pool.empty(x, len(x), self.linear.dim_out)
        for rows, weight in self._pieces(x.dtype):
            torch.mm(x, weight.T, out=y[:, rows])
        return self._with_lora(y, x, 1.0)

    def residual(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(h + Linear(x)) * RESIDUAL_SCALE, h [T, dim_out], x [T, dim_in]; scales by itself."""
        alpha = RESIDUAL_SCALE * self.linear.scale
        y = buffer_pool.empty(h, *h.shape)
        for rows, weight in self._pieces(x.dtype):
            part = h[:, rows]
            torch.addmm(part, x, weight.T, beta=RESIDUAL_SCALE, alpha=alpha, out=y[:, rows])
        return self._with_lora(y, x, alpha)

    def _with_lora(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
        if not self.lora or self._merges(x.dtype):
            return y
        a, b = (p.to(x.dtype) for p in self.lora)
        return y.addmm_(F.linear(x, a), b.T, alpha=scale * self._factor)

    def input_gradient(self, gy: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale * gy W' [T, dim_in]."""
        out = buffer_pool.empty(gy, len(gy), self.linear.dim_in)
        return self._add_input_gradient(out, gy, scale, before=0)

    def add_input_gradient(self, out: torch.Tensor, gy: torch.Tensor) -> None:
        """Adds gy W' to `out` [T, dim_in]."""
        self._add_input_gradient(out, gy, 1.0, before=1)

    def _add_input_gradient(
        self, out: torch.Tensor, gy: torch.Tensor, scale: float, before: int
    ) -> torch.Tensor:
        for rows, weight in self._pieces(gy.dtype):
            torch.addmm(out, gy[:, rows], weight, beta=before, alpha=scale, out=out)
            before = 1
        if self.lora and not self._merges(gy.dtype):
            a, b = (p.to(gy.dtype) for p in self.lora)
            out.addmm_(gy @ b, a, alpha=scale * self._factor)
        return out

    def gradients(
        self, gy: torch.Tensor | None, x: torch.Tensor, scale: float = 1.0
    ) -> list[torch.Tensor | None]:
        """The gradients of the operands (None) and of the LoRA from gy [T, dim_out].

        Args:
            x: the input of `forward`, [T, dim_in].
            scale: the factor of the product in the output whose gradient is gy.
        """
        frozen: list[torch.Tensor | None] = [None] * len(self.operands)
        if not self.lora or gy is None:
            return frozen
        a, b = (p.to(x.dtype) for p in self.lora)
        factor = scale * self._factor
        # A CPU takes half the time if the narrow matrices are contiguous along their long side.
        grad_a = (F.linear(gy, b.T.contiguous()).T @ x).mul_(factor)  # (r, dim_in)
        grad_b = (F.linear(x, a).T @ gy).mul_(factor).T.contiguous()  # (dim_out, r)
        return [*frozen, grad_a.to(self.lora[0].dtype), grad_b.to(self.lora[1].dtype)]
