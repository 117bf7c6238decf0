"""Section 11: differences from the reference."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path

import torch
from dataset_writer import DatasetWriter
from golden.conftest import best_fit

from cpm_bee.data.batch import extension_pairs
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.packing import pack
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import Encoder
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.layers import Embedding
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS, NF4_VALUES
from format_examples.common import (
    TINY,
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
def row_stream(page: Json) -> Rows:
    lengths = page("lengths")
    rows = pack(range(len(lengths)), lengths, 10)
    return [
        [str(i), " ".join(map(str, row)), str(sum(lengths[n] for n in row))]
        for i, row in enumerate(rows)
    ]


@example
def packing_fill(page: Json) -> Rows:
    """Rows of 512 tokens that 4,000 random records fill, eight rows a step."""
    rng = random.Random(0)
    lengths = [min(512, int(rng.lognormvariate(5, 0.6))) for _ in range(4000)]
    best = sum(len(step.rows) for step in best_fit(lengths, 8, 512))
    shares = [lengths[i::8] for i in range(8)]
    streams = sum(len(list(pack(range(len(s)), s, 512))) for s in shares)
    least = math.ceil(sum(lengths) / 512)
    return [["best fit", str(best)], ["row streams", str(streams)], ["least possible", str(least)]]


@example
def extension_orders(page: Json) -> Rows:
    """The pairs of two records, by appearance and as a training step numbers them."""
    records = page("numbering")
    encoder = Encoder(VOCABULARY)
    appearance = extension_pairs([encoder.encode(record) for record in records])
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder) / "d", "data", block_size=4096) as writer:
            for record in records:
                writer.write(record)
        index = TokenIndex.of(BinaryDataset(Path(folder) / "d"), VOCABULARY)
        training = index.extension_pairs(index.largest_subs(range(len(records))))
    return [
        [str(len(VOCABULARY) + i), str(a), str(b)]
        for i, (a, b) in enumerate(zip(appearance, training, strict=True))
    ]


@example
def no_placeholder(page: Json) -> Rows:
    rows = []
    for record in page("placeholder"):
        batch = batch_of([record])
        embedding = Embedding(config())
        with torch.no_grad():
            embedding.weight.zero_()
            h = torch.zeros(1, 4)
            logits = embedding.logits(h, batch.extension_ids, batch.extension_subs)
        written = json.dumps(record, ensure_ascii=False)
        rows.append([written, str(len(batch.extension_ids)), str(logits.shape[1])])
    return rows


@example
def initial_deviations(page: Json) -> Rows:
    sizes = ModelConfig.load(TINY / "config.json")
    model = CPMBee(sizes)
    model.load_state_dict(dict(initial_values(model, seed=0)))
    tensors = dict(model.named_parameters())
    layer, half = "encoder.layers.0", sizes.num_heads // 2
    attention = f"{layer}.self_att.self_attention"
    inner = half * sizes.dim_head
    bias = tensors["position_bias.relative_attention_bias"]
    parts = {
        "input_embedding": tensors["input_embedding.weight"],
        "position_bias, matching heads": bias[:, :half],
        "position_bias, other heads": bias[:, half:],
        "project_q, matching heads": tensors[f"{attention}.project_q.weight"][:inner],
        "project_q, other heads": tensors[f"{attention}.project_q.weight"][inner:],
        "project_v": tensors[f"{attention}.project_v.weight"],
        "attention_out": tensors[f"{attention}.attention_out.weight"],
        "w_0, w_1": tensors[f"{layer}.ffn.ffn.w_in.w_0.weight"],
        "w_out": tensors[f"{layer}.ffn.ffn.w_out.weight"],
    }
    return [[name, f"{float(value.detach().std()):.2g}"] for name, value in parts.items()]


@example
def quantized(page: Json) -> Rows:
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([0.5, -2.0, 0.1, 1.2])
    rows = []
    for name, format in FORMATS.items():
        codes, absmax = format.quantize(w)
        restored = format.dense(codes, absmax, torch.float32)[0, :4].tolist()
        stored = codes[0, : 2 if name == "nf4" else 4].tolist()
        rows.append(
            [name, number(float(absmax[0, 0])), " ".join(map(str, stored)), numbers(restored)]
        )
    return rows


@example
def nf4_values(page: Json) -> Rows:
    return [
        [f"{i} to {i + 3}", ", ".join(f"{v:.7f}" for v in NF4_VALUES[i : i + 4])]
        for i in range(0, 16, 4)
    ]
