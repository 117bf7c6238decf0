"""Section 5: the model."""

from __future__ import annotations

import dataclasses
import json

import torch

from cpm_bee.data.batch import Batch, collate
from cpm_bee.encoding import Encoder
from cpm_bee.model.attention import PaddedGroups, PositionBias
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.layers import Embedding, FeedForwardBlock, Linear, RMSNorm
from cpm_bee.model.network import target_loss
from cpm_bee.segments import SpanTree
from format_examples.common import (
    VOCABULARY,
    Json,
    Rows,
    batch_of,
    config,
    example,
    number,
    numbers,
)


@example
def layer_values(page: Json) -> Rows:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    linear, norm, block = Linear(4, 2), RMSNorm(4, 1e-6), FeedForwardBlock(config())
    feed_forward = block.ffn
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, -1.0, 1.0, -1.0]]))
        norm.weight.copy_(torch.tensor([1.0, 1.0, 2.0, 2.0]))
        feed_forward.w_in.w_0.weight.copy_(linear.weight)
        feed_forward.w_in.w_1.weight.copy_(torch.ones(2, 4))
        feed_forward.w_out.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]]))
        block.layernorm_before_ffn.weight.copy_(norm.weight)
        results = [linear(x), norm(x), feed_forward(x), block(x)]
    return [
        [name, numbers(result.tolist())]
        for name, result in zip(
            ["Linear", "RMS norm", "ffn", "second half of a block"], results, strict=True
        )
    ]


@example
def config_fields(page: Json) -> Rows:
    required = {f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING}
    defaults = config().__dict__
    return [
        [name, "required" if name in required else json.dumps(value).replace("[]", "none")]
        for name, value in defaults.items()
    ]


@example
def rotary(page: Json) -> Rows:
    embedding = Embedding(config())
    with torch.no_grad():
        embedding.weight[2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        values = embedding(torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2]))
    return [[str(sub), numbers(row)] for sub, row in enumerate(values.tolist())]


@example
def position_rows(page: Json) -> Rows:
    distances = [-5000, -2047, -1000, -128, -65, -64, -63, -2, -1]
    distances = [*distances, 0, *(-d for d in reversed(distances))]
    rows = PositionBias(config()).position_rows(torch.tensor(distances)).tolist()
    return [[str(r), str(row)] for r, row in zip(distances, rows, strict=True)]


@example
def attention_rows(page: Json) -> Rows:
    batch = batch_of([page("seen")])
    bias = PositionBias(config())
    rows = PaddedGroups.of(batch, bias).rows[0][0]  # (queries, keys)
    queries = [6, 13]
    return [
        [
            str(k),
            VOCABULARY.tokens[int(batch.ids[k])],
            str(int(batch.segments[k])),
            *("hidden" if rows[q, k] == bias.masked_row else str(int(rows[q, k])) for q in queries),
        ]
        for k in range(batch.num_tokens)
    ]


@example
def sample_rows(page: Json) -> Rows:
    given = page("sample")
    encoded = Encoder(VOCABULARY, [given["sample"]]).encode(given["record"])
    batch = collate([encoded], VOCABULARY)
    bias = PositionBias(config())
    rows = PaddedGroups.of(batch, bias).rows[0][0]  # (queries, keys)
    assert isinstance(encoded.tree, SpanTree)
    own = len(encoded.tree.record.depths)
    queries = (6, 13, 21)
    return [
        [
            str(k),
            VOCABULARY.tokens[int(batch.ids[k])],
            str(int(batch.segments[k] >= own)),
            *("hidden" if rows[q, k] == bias.masked_row else str(int(rows[q, k])) for q in queries),
        ]
        for k in range(batch.num_tokens)
    ]


@example
def logits_and_loss(page: Json) -> Rows:
    """Three tokens of the vocabulary, one pair (2, 1), dim_model 4; targets 1 and 3 (the pair)."""
    embedding = Embedding(config(vocab_size=3))
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0.0, 2, 0, 0], [1.0, 1, 1, 1]]))
        h = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0]])
        logits = embedding.logits(h, torch.tensor([2]), torch.tensor([1]))
        whole = batch_of(page("row"))
        batch = Batch(**{**vars(whole), "targets": torch.tensor([1, 3])})
        total = float(target_loss(logits, batch))
        chosen = (logits.logsumexp(1) - logits[torch.arange(2), batch.targets]).tolist()
    assert abs(total - sum(chosen)) < 1e-5
    rows = [
        [str(i), numbers(values), str(t), number(loss)]
        for i, (values, t, loss) in enumerate(
            zip(logits.tolist(), batch.targets.tolist(), chosen, strict=True)
        )
    ]
    return [*rows, ["mean", "", "", number(total / 2)]]
