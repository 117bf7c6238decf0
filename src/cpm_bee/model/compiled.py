"""Blocks compiled by torch.compile. Imported only where wanted: it loads the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.layers import Attend
from cpm_bee.model.network import BlockStack

BACKEND = "inductor"
# Compiled forms of one function before PyTorch gives up: layers differ (pruned ones, the last one,
# those below the lowest delta), and so do passes with and without gradients.
_FORMS = 64


class _Uncompiled:
    """An attention that the compiler does not look into: it is a kernel of its own already."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    @torch.compiler.disable
    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(layer, q, k, v)


def compile_blocks(encoder: BlockStack) -> None:
    """Compile what lies around the attention of each block, in place; the results are the same.

    The compiled form has PyTorch's own gradients, for which the compiler decides what to keep: the
    hand-written backward pass of frozen blocks is not used. Call after `set_checkpointing`.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_FORMS, torch._dynamo.config.recompile_limit)
    for layer in encoder.layers:
        assert isinstance(layer, TransformerBlock)
        compiled = torch.compile(layer.plain, backend=BACKEND, dynamic=True)
        # Beside the class's own: names and parameters stay as they are.
        setattr(layer, "forward", partial(_forward, layer, compiled))  # noqa: B010


def _forward(
    layer: TransformerBlock,
    compiled: Callable[..., Any],
    h: torch.Tensor,
    attend: Attend,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    if layer.self_att is None and queries is not None:
        h, queries = h[queries], None
    arguments = (h, _Uncompiled(attend), queries)
    if layer.checkpointing and torch.is_grad_enabled():
        recomputed: torch.Tensor = checkpoint(compiled, *arguments, use_reentrant=False)
        return recomputed
    result: torch.Tensor = compiled(*arguments)
    return result
