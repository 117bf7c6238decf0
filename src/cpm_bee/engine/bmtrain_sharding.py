"""Shards a model over processes with bmtrain, which the caller passes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cpm_bee.checkpoint.loading import drop_pages
from cpm_bee.delta import LoRA
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.network import CPMBee


def shard_model(
    bmt: Any,
    model: CPMBee,
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Shard every tensor over the processes (ZeRO-3); returns the parts to train, by name.

    A part is flat; it is empty if the process holds nothing of its tensor. The model may be of any
    type and memory-mapped: each process reads its own parts, layer by layer.

    Args:
        dtype: the type of all weights except a LoRA's, which keep theirs.
        autocast: the context of every forward pass.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for i, layer in enumerate(model.encoder.layers):
        assert isinstance(layer, TransformerBlock)
        _split(bmt, layer, dtype)
        model.encoder.layers[i] = _block(bmt, layer, autocast)
    _split(bmt, model, dtype)
    bmt.BMTrainModelWrapper(model)
    model.context = _gathered_once(model)
    parts = dict(model.named_parameters())
    return {name: parts[name] for name in names}


def _split(bmt: Any, model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the parameters of a module, except those in blocks, with this process's parts."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, bmt.DistributedParameter):
                continue
            whole = parameter.detach()
            part = bmt.DistributedParameter(whole, parameter.requires_grad)
            drop_pages(whole)
            if part.is_floating_point() and not isinstance(module, LoRA):
                _convert(part, dtype)
            module._parameters[leaf] = part


def _convert(part: Any, dtype: torch.dtype) -> None:
    """Change the type of a part in place. Its storage may be longer than the part."""
    if part.dtype != dtype:
        values = torch.empty(part.storage().size(), dtype=dtype, device=part.device)
        values[: part.numel()] = part.data
        part.data = values[: part.numel()]


def _block(
    bmt: Any, layer: TransformerBlock, autocast: Callable[[], AbstractContextManager[Any]]
) -> nn.Module:
    """Wrap a layer so that its tensors are gathered only while it computes.

    The layer recomputes activations by itself (`TransformerBlock.checkpointing`). bmtrain's own
    checkpointing detaches the arguments, and fails on the gradient of a tensor that reaches the
    layer in another way, as the trained bias table does.
    """
    # Where only a layer's parameters need gradients, bmtrain computes it again in the backward
    # pass, outside of the forward pass's autocast.
    layer.context = autocast
    return bmt.Block(bmt.BMTrainModelWrapper(layer), use_checkpoint=False)


def _gathered_once(model: CPMBee) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context of a pass, which gathers each tensor outside the layers once.

    By itself, bmtrain gathers at each access. The number of accesses depends on the records, so
    processes would wait for each other forever; and the embedding is accessed three times.
    """
    outside = [
        (module, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and not parameter._in_block  # type: ignore[attr-defined]
    ]

    @contextlib.contextmanager
    def gathered() -> Iterator[None]:
        for module, leaf in outside:
            part: Any = module._parameters[leaf]
            whole = part.gather()
            if whole.requires_grad:
                whole.register_hook(_own_storage)
            vars(module)[leaf] = whole  # found before the parameter
        try:
            yield
        finally:
            for module, leaf in outside:
                del vars(module)[leaf]

    return gathered


def _own_storage(gradient: torch.Tensor) -> torch.Tensor:
    # bmtrain sends a gradient's storage from its start, and resizes it: wrong for a view.
    storage = gradient.untyped_storage().nbytes()
    if gradient.is_contiguous() and storage == gradient.numel() * gradient.element_size():
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def part_of(part: Any, whole: torch.Tensor) -> torch.Tensor:
    """The values of a whole tensor that a part holds, in fp32 on the CPU."""
    if not part.numel():
        return torch.empty(0)
    return whole.reshape(-1)[part._start_partition : part._end_partition].float().cpu().clone()


@torch.no_grad()
def whole_of(bmt: Any, part: Any, own: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Gathers a tensor to rank 0's CPU from all ranks' values `own`, laid out like `part`.

    Collective; returns an empty tensor on the other ranks.
    """
    whole = torch.zeros(part._original_shape.numel(), dtype=own.dtype, device=device)
    if part.numel():
        whole[part._start_partition : part._end_partition] = own.to(device)
    whole = bmt.distributed.all_reduce(whole, "sum")
    return whole.view(part._original_shape).cpu() if bmt.rank() == 0 else torch.empty(0)
