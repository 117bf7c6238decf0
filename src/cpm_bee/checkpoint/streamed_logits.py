"""The logits of a model whose weights are read from their files one at a time.

A model on the meta device runs one small batch in double precision. Each Linear and each norm gets
its weight right before it is used and loses it right after; of the embedding, the rows of the batch
are read, and for the logits a few thousand rows at a time.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.checkpoint.loading import drop_pages, set_parameter
from cpm_bee.data.batch import Batch, collate
from cpm_bee.encoding import Encoder
from cpm_bee.model.layers import Linear, RMSNorm
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer

# Returns the weight of this name, in any type.
ReadWeight = Callable[[str], torch.Tensor]

_EMBEDDING, _BIAS = "input_embedding.weight", "position_bias.relative_attention_bias"
_ROWS = 4096  # of the embedding that are in double precision at once
_WORDS = 32  # of the probe, in the context and, half as many, in the answer


def probe_batch(tokenizer: Tokenizer) -> Batch:
    """One record of random words of a vocabulary, the same each time."""
    chosen = random.Random(0)
    words = [t for t in tokenizer.tokens if "<" not in t and ">" not in t] or ["a"]
    context, answer = ("".join(chosen.choices(words, k=k)) for k in (_WORDS, _WORDS // 2))
    record = Encoder(tokenizer).encode({"input": context, "<ans>": answer})
    return collate([record], tokenizer)


@torch.no_grad()
def streamed_logits(model: CPMBee, batch: Batch, read: ReadWeight) -> torch.Tensor:
    """Logits at the targets in double precision, [N, vocab_size + E].

    Args:
        model: a model on the meta device, perhaps with LoRA that has its values, in double
            precision too.
        read: returns a weight by native name.
    """
    table = read(_EMBEDDING)
    embedding = model.input_embedding

    def embed(ids: torch.Tensor, subs: torch.Tensor) -> torch.Tensor:
        set_parameter(embedding, "weight", table[ids].double())
        return embedding(torch.arange(len(ids)), subs)

    set_parameter(model, _BIAS, read(_BIAS).double())
    with _weights_on_demand(model, read):
        h = embed(batch.ids, batch.subs)  # (T, dim_model)
        attend_last = model.attention_over(batch, h, at_targets=True)
        attend = model.attention_over(batch, h)
        h = model.encoder(h, attend, attend_last, batch.target_positions)
        h = model.encoder.output_layernorm(h)  # (N, dim_model)
    parts = []
    for rows in table.split(_ROWS):
        parts.append(F.linear(h * embedding.scale, rows.double()))
        drop_pages(rows)
    if len(batch.extension_ids):
        parts.append(F.linear(h, embed(batch.extension_ids, batch.extension_subs)))
    return torch.cat(parts, dim=-1)


@contextlib.contextmanager
def _weights_on_demand(model: CPMBee, read: ReadWeight) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (Linear, RMSNorm)):
            handles += _load_on_demand(f"{name}.weight", module, read)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _load_on_demand(name: str, module: nn.Module, read: ReadWeight) -> list[Any]:
    empty = module.get_parameter("weight")

    def load(*_: Any) -> None:
        stored = read(name)
        set_parameter(module, "weight", stored.double())
        drop_pages(stored)

    def release(*_: Any) -> None:
        module.weight = empty

    return [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
