"""Compiles layers with torch.compile. Imported only on demand, because it loads the compiler.

`compile_blocks` compiles `block.run_blocks` once and sets, for each layer, a call of it as the
layer's `compiled_layer`, which `forward` then uses. Parameters and names are unchanged. Two things
stay outside the graph and divide it into parts:

- the attention function: it is already one kernel, and its shapes differ in every batch;
- the product with a quantized weight, which the compiler cannot trace.

All layers of one kind share the compiled parts. The index of a layer must not reach the compiler
for that, since it would compile a form for each value: it is bound to the attention function.

The compiled form uses PyTorch's gradients, and the compiler decides what to keep for them: the
backward pass of `model/frozen` is not used.
"""

from __future__ import annotations

from typing import Any

import torch

from cpm_bee.model.block import TransformerBlock, run_blocks
from cpm_bee.model.layers import AttentionFunction, Linear
from cpm_bee.model.network import BlockStack

BACKEND = "inductor"
# The number of compiled forms of one function before PyTorch gives up: kinds of layers differ
# (pruned, last, or below the lowest delta), and so do passes with and without gradients.
_RECOMPILE_LIMIT = 64


_NO_LAYER = 0  # in place of a layer's index, the same for all layers


class _OutsideGraph:
    """The attention function of one layer, which the compiler calls without tracing it."""

    def __init__(self, attend: AttentionFunction, layer: int) -> None:
        self._attend, self._layer = attend, layer

    @torch.compiler.disable
    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(self._layer, q, k, v)


@torch.compiler.disable
def _product_outside_graph(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return linear.base(x)


class _CompiledLayer:
    def __init__(self, layer: TransformerBlock, compiled: Any) -> None:
        self._layer, self._compiled = layer, compiled

    def __call__(
        self, h: torch.Tensor, attend: AttentionFunction, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        layer = self._layer
        attend = _OutsideGraph(attend, layer.layer)
        result: torch.Tensor = self._compiled(
            layer.self_att, layer.ffn, _NO_LAYER, h, attend, queries
        )
        return result


def compile_blocks(encoder: BlockStack) -> None:
    """Compile all layers in place, without their attention functions; results stay the same."""
    compile_function: Any = torch.compile  # its types lack `recompile_limit`
    compiled = compile_function(
        run_blocks, backend=BACKEND, dynamic=True, recompile_limit=_RECOMPILE_LIMIT
    )
    for layer in encoder.layers:
        assert isinstance(layer, TransformerBlock)
        layer.compiled_layer = _CompiledLayer(layer, compiled)
        for linear in layer.modules():
            if isinstance(linear, Linear) and not linear.is_traceable:
                linear.outside_graph = _product_outside_graph
