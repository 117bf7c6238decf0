"""docs/format.md §3-5 in plain Python, pair by pair and in double precision: slow, independent.

Shares only the matching of vocabulary entries with the library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from pieces import split_pieces

from cpm_bee.model.config import ModelConfig
from cpm_bee.records import Record, Tree
from cpm_bee.tokenizer import Piece, Tokenizer

Path = tuple[int, ...]
Weights = Mapping[str, torch.Tensor]


class Node(NamedTuple):
    path: Path  # from the root; its length is the depth
    text: str
    is_context: bool


class Token(NamedTuple):
    id: int
    sub: int
    node: int  # in `nodes_of` the record and its samples
    is_context: bool
    sample: int = 0  # 0: of the record itself


def nodes_of(record: Record, samples: Sequence[Record] = ()) -> list[Node]:
    def below(path: Path, tree: Tree, in_answer: bool) -> Iterator[Node]:
        if isinstance(tree, str):
            yield Node((*path, 0), tree, not in_answer)
            return
        for i, (key, value) in enumerate(tree.items()):
            yield Node((*path, i), key, True)
            yield from below((*path, i), value, in_answer or (path == () and key == "<ans>"))

    own = [Node((), "<root>", True), *below((), record, False)]
    for sample in samples:  # all of a sample is given
        own += [node._replace(is_context=True) for node in nodes_of(sample)]
    return own


@functools.cache
def bucket(a: Path, b: Path) -> int:
    if a == b:
        return 0
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    up, down = min(len(a) - common, 7), min(len(b) - common, 7)
    return up * 8 + down + (1 if up * 8 + down else 0)


def tokens_of(
    record: Record, tokenizer: Tokenizer, *, answers: bool = True, samples: Sequence[Record] = ()
) -> list[Token]:
    entries: dict[int, list[Piece]] = {}  # distinct extension entries of each id
    tokens = []
    number = 0
    for sample, own in enumerate((record, *samples)):
        for node in nodes_of(own):
            if node.is_context or answers or sample:
                pairs = [(tokenizer.ids["<s>"], 0), *_pairs(node.text, tokenizer, entries)]
                if node.is_context:
                    pairs.append((tokenizer.ids["</s>"], 0))
                is_context = node.is_context or sample > 0
                tokens += [Token(i, s, number, is_context, sample) for i, s in pairs]
            number += 1
    return tokens


def _pairs(
    text: str, tokenizer: Tokenizer, entries: dict[int, list[Piece]]
) -> Iterator[tuple[int, int]]:
    for piece in split_pieces(tokenizer, text):
        if piece.is_unknown or (piece.is_special and piece.text not in tokenizer.specials):
            name = f"<{piece.text[1:-1].split('_')[0]}>" if piece.is_special else "<unk>"
            own = entries.setdefault(tokenizer.ids[name], [])
            if piece not in own:
                own.append(piece)
            yield tokenizer.ids[name], own.index(piece)
        else:
            listed = {"\n": "</n>", " ": "</_>"}.get(piece.text, piece.text)
            yield tokenizer.ids[listed], 0


def targets_of(tokens: list[Token], tokenizer: Tokenizer) -> list[tuple[int, tuple[int, int]]]:
    """(position, (id, sub) that follows it)."""
    targets = []
    for j, token in enumerate(tokens):
        if token.is_context:
            continue
        last = j == len(tokens) - 1
        if last or tokens[j + 1].id == tokenizer.ids["<s>"]:
            targets.append((j, (tokenizer.ids["</s>"], 0)))
        else:
            targets.append((j, (tokens[j + 1].id, tokens[j + 1].sub)))
    return targets


def position_row(config: ModelConfig, r: int) -> int:
    half = config.position_bias_num_buckets // 2
    exact = half // 2
    row = half if r > 0 else 0
    if abs(r) < exact:
        return row + abs(r)
    share = math.log(abs(r) / exact) / math.log(config.position_bias_max_distance / exact)
    return row + min(half - 1, exact + int(share * (half - exact)))


def bias_row(config: ModelConfig, nodes: list[Node], tokens: list[Token], q: int, k: int) -> int:
    """Row of the bias table for a pair of positions, -1 where q does not see k."""
    if not (tokens[k].is_context or (not tokens[q].is_context and k <= q)):
        return -1
    if tokens[q].sample != tokens[k].sample:
        return config.position_bias_num_buckets if tokens[q].sample == 0 else -1  # bucket 1
    relation = bucket(nodes[tokens[q].node].path, nodes[tokens[k].node].path)
    if relation == 0:
        return position_row(config, k - q)
    return config.position_bias_num_buckets + relation - 1


def embed(config: ModelConfig, table: torch.Tensor, token_id: int, sub: int) -> torch.Tensor:
    e = table[token_id] / math.sqrt(config.dim_model)
    half = config.dim_model // 2
    f = [16 * sub * 10000 ** (-2 * i / config.dim_model) for i in range(half)] * 2
    cos = torch.tensor([math.cos(x) for x in f], dtype=torch.float64)
    sin = torch.tensor([math.sin(x) for x in f], dtype=torch.float64)
    return e * cos + torch.cat([-e[half:], e[:half]]) * sin


def norm(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.eps) * weight


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T / math.sqrt(weight.shape[1])


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def states(
    config: ModelConfig,
    weights: Weights,
    record: Record,
    tokens: list[Token],
    samples: Sequence[Record] = (),
) -> torch.Tensor:
    """The states of a record after the last norm, float64 [n, dim_model]."""
    n = len(tokens)
    table = weights["position_bias.relative_attention_bias"]
    embedding = weights["input_embedding.weight"]
    nodes = nodes_of(record, samples)
    row = functools.partial(bias_row, config, nodes, tokens)
    rows = torch.tensor([[row(q, k) for k in range(n)] for q in range(n)])
    h = torch.stack([embed(config, embedding, t.id, t.sub) for t in tokens])
    for i in range(config.num_layers):
        own = {
            name.removeprefix(f"encoder.layers.{i}."): w
            for name, w in weights.items()
            if name.startswith(f"encoder.layers.{i}.")
        }
        if config.has_attention(i):
            x = norm(config, h, own["self_att.layernorm_before_attention.weight"])
            inner = "self_att.self_attention."
            q, k, v = (linear(x, own[f"{inner}project_{p}.weight"]) for p in "qkv")
            heads = []
            for head in range(config.num_heads):
                part = slice(head * config.dim_head, (head + 1) * config.dim_head)
                scores = q[:, part] @ k[:, part].T / math.sqrt(config.dim_head)
                scores = scores + table[rows, head]
                scores = torch.where(rows < 0, -math.inf, scores)
                heads.append(torch.softmax(scores, -1) @ v[:, part])
            x = linear(torch.cat(heads, -1), own[f"{inner}attention_out.weight"])
            h = (h + x) / 1.05
        if config.has_ffn(i):
            x = norm(config, h, own["ffn.layernorm_before_ffn.weight"])
            w_0, w_1 = own["ffn.ffn.w_in.w_0.weight"], own["ffn.ffn.w_in.w_1.weight"]
            x = linear(gelu(linear(x, w_0)) * linear(x, w_1), own["ffn.ffn.w_out.weight"])
            h = (h + x) / 1.05
    return norm(config, h, weights["encoder.output_layernorm.weight"])


def logits_and_loss(
    config: ModelConfig,
    weights: Weights,
    records: list[Record],
    tokenizer: Tokenizer,
    samples: Sequence[Sequence[Record]] = (),
) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor]:
    """Logits at the targets [N, vocab_size + E], the E extension pairs, and the mean loss.

    `samples` are the in-context samples of each record; without it there are none.
    """
    samples = samples or [()] * len(records)
    encoded = [
        tokens_of(record, tokenizer, samples=own)
        for record, own in zip(records, samples, strict=True)
    ]
    pairs = list(dict.fromkeys((t.id, t.sub) for tokens in encoded for t in tokens if t.sub))
    embedding = weights["input_embedding.weight"]
    output = embedding / math.sqrt(config.dim_model)
    if pairs:
        extension = torch.stack([embed(config, embedding, i, s) for i, s in pairs])
        output = torch.cat([output, extension])
    logits, wanted = [], []
    for record, own, tokens in zip(records, samples, encoded, strict=True):
        h = states(config, weights, record, tokens, own)
        for position, (token_id, sub) in targets_of(tokens, tokenizer):
            logits.append(h[position] @ output.T)
            wanted.append(config.vocab_size + pairs.index((token_id, sub)) if sub else token_id)
    stacked = torch.stack(logits)
    chosen = stacked[torch.arange(len(wanted)), torch.tensor(wanted)]
    return stacked, pairs, (torch.logsumexp(stacked, -1) - chosen).mean()
