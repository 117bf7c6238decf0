"""Compiles layers with torch.compile. Imported only on demand, because it loads the compiler.

`compile_blocks` compiles `TransformerBlock.layer_output` of each layer and sets the result as the
layer's `compiled_layer`, which `forward` then uses. The attention function stays outside the graph:
it is already one kernel, and its shapes differ in every batch. Parameters and names are unchanged.

The compiled form uses PyTorch's gradients, and the compiler decides what to keep for them: the
backward pass of `model/frozen` is not used.
"""

from __future__ import annotations

from typing import Any

import torch

from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.layers import AttentionFunction
from cpm_bee.model.network import BlockStack

BACKEND = "inductor"
# The number of compiled forms of one function before PyTorch gives up: layers differ (pruned, last,
# or below the lowest delta), and so do passes with and without gradients.
_RECOMPILE_LIMIT = 64


class _OutsideGraph:
    """An attention function that the compiler calls without tracing it."""

    def __init__(self, attend: AttentionFunction) -> None:
        self._attend = attend

    @torch.compiler.disable
    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(layer, q, k, v)


class _CompiledLayer:
    def __init__(self, layer: TransformerBlock) -> None:
        self._compiled: Any = torch.compile(layer.layer_output, backend=BACKEND, dynamic=True)

    def __call__(
        self, h: torch.Tensor, attend: AttentionFunction, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        result: torch.Tensor = self._compiled(h, _OutsideGraph(attend), queries)
        return result


def compile_blocks(encoder: BlockStack) -> None:
    """Compile each layer in place, except its attention function; results stay the same."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(
        _RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit
    )
    for layer in encoder.layers:
        assert isinstance(layer, TransformerBlock)
        layer.compiled_layer = _CompiledLayer(layer)
