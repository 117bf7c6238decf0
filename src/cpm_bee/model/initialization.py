"""Random initial weights, for training without a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from cpm_bee.model.attention import PositionBias
from cpm_bee.model.block import TransformerBlock
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import Attention, Embedding, RMSNorm
from cpm_bee.model.network import CPMBee

# Found by experiment on small models: with independent N(0, 1) weights everywhere, a model of four
# layers does not learn to compare two texts within 3 million tokens; with these it does within one.
_EMBEDDING_STD = 4.0
_COPY_SCALE = 0.3  # of attention_out, as a multiple of project_v transposed
_FFN_OUT_SCALE = 0.1
_MATCHING_BIAS, _OTHER_BIAS = 0.5, 2.0  # standard deviation of the bias table, by type of head
_OTHER_QUERY_SCALE = 0.3


@torch.no_grad()
def initial_values(model: CPMBee, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields random weights by name, the same on every machine; one layer in memory at a time.

    The model is not changed and may be on the meta device.

    Weights are drawn from N(0, 1) and norms are 1 (docs/format.md §5). Then, following mimetic
    initialisation (Trockman and Kolter, 2023): half of the heads compare contents
    (project_k = project_q); the other half depend little on content and strongly on position and
    relation; attention copies what it reads (attention_out is a multiple of project_v transposed);
    feed-forward blocks have small outputs. Embeddings are scaled up so that they are not dominated
    by the blocks' outputs, and the last norm scales down again.
    """
    generator = torch.Generator().manual_seed(seed)
    for prefix, module in _parts(model):
        part = copy.deepcopy(module).float().to_empty(device="cpu")
        for name, parameter in part.named_parameters():
            if "layernorm" in f"{prefix}.{name}":
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        _adjust(part, model.config)
        for name, parameter in part.named_parameters():
            yield f"{prefix}.{name}", parameter.detach()


def _parts(model: CPMBee) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model in the order of their parameters."""
    yield "input_embedding", model.input_embedding
    yield "position_bias", model.position_bias
    for i, layer in enumerate(model.encoder.layers):
        yield f"encoder.layers.{i}", layer
    yield "encoder.output_layernorm", model.encoder.output_layernorm


def _adjust(part: nn.Module, config: ModelConfig) -> None:
    matching = config.num_heads // 2
    if isinstance(part, Embedding):
        part.weight.mul_(_EMBEDDING_STD)
    elif isinstance(part, RMSNorm):
        part.weight.fill_(1 / _EMBEDDING_STD)
    elif isinstance(part, PositionBias):
        bias = part.relative_attention_bias  # (rows, heads)
        bias[:, :matching] *= _MATCHING_BIAS
        bias[:, matching:] *= _OTHER_BIAS
    elif isinstance(part, TransformerBlock):
        if part.self_att is not None:
            _prepare_attention(part.self_att.self_attention, config, matching)
        if part.ffn is not None:
            part.ffn.ffn.w_out.weight.mul_(_FFN_OUT_SCALE)


def _prepare_attention(attention: Attention, config: ModelConfig, matching: int) -> None:
    heads = (config.num_heads, config.dim_head, config.dim_model)
    q = attention.project_q.weight.view(heads)
    k = attention.project_k.weight.view(heads)
    k[:matching] = q[:matching]
    q[matching:] *= _OTHER_QUERY_SCALE
    k[matching:] *= _OTHER_QUERY_SCALE
    attention.attention_out.weight.copy_(_COPY_SCALE * attention.project_v.weight.T)
