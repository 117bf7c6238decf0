"""Sections 1 to 4: records, tokens, segments, packing."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
from golden.conftest import best_fit
from pieces import split_pieces
from support import ROOT

from cpm_bee.data.forms.converter import Converter
from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.encoding import Encoder
from cpm_bee.records import validate
from cpm_bee.segments import outline
from cpm_bee.tokenizer import ExtensionTable
from format_examples.common import VOCABULARY, Json, Rows, batch_of, example


@example
def converted_record(page: Json) -> list[str]:
    path = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    spec = importlib.util.spec_from_file_location("format_doc_data_reformat", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = [module.reformat(page("raw-tutorial")), module.reformat(page("raw-release"))]
    assert made[0] == made[1]
    return [json.dumps(made[0], ensure_ascii=False)]


@example
def dialogue_records(page: Json) -> list[str]:
    row = page("dialogue")
    made = Converter("format.md:1", row, ConversionOptions()).convert(row)
    return [json.dumps(record, ensure_ascii=False) for record in made]


@example
def valid_records(page: Json) -> Rows:
    texts = [
        '{"input": "天", "<ans>": ""}',
        '{"<ans>": {"a": "天", "b": {"c": "海"}}}',
        '{"input": "a << b", "<ans>": "天"}',
        '{"input": "a < b", "<ans>": "天"}',
        '{"input": "天"}',
        '{"input": 3, "<ans>": "天"}',
        '{"input": "天", "<ans>": {}}',
    ]
    return [[text, "no" if validate(json.loads(text)) else "yes"] for text in texts]


@example
def tokenizer_texts(page: Json) -> Rows:
    rows = []
    table = ExtensionTable(len(VOCABULARY))
    for text in page("texts"):
        pieces = " ".join(
            json.dumps(p.text, ensure_ascii=False) for p in split_pieces(VOCABULARY, text)
        )
        ids = VOCABULARY.encode(text, table)
        decoded = VOCABULARY.decode(ids, table)
        shown = [text, decoded]
        written, again = (json.dumps(t, ensure_ascii=False) for t in shown)
        rows.append([written, pieces, " ".join(map(str, ids)), again])
    return rows


@example
def extension_table(page: Json) -> Rows:
    table = ExtensionTable(len(VOCABULARY))
    for text in page("texts"):
        VOCABULARY.encode(text, table)
    return [
        [str(len(VOCABULARY) + i), piece.text, "special token" if piece.is_special else "unknown"]
        for i, piece in enumerate(table.pieces)
    ]


@example
def segments(page: Json) -> Rows:
    texts, tree = outline(page("record"))
    record = Encoder(VOCABULARY).encode(page("record"))
    rows = []
    for i, (text, depth, predicted) in enumerate(
        zip(texts, tree.depths, tree.predicted, strict=True)
    ):
        own = record.segments == i
        pairs = zip(record.ids[own].tolist(), record.subs[own].tolist(), strict=True)
        shown = " ".join(f"{i}" if not s else f"{i}:{s}" for i, s in pairs)
        role = "predicted" if predicted else "context"
        rows.append([str(i), text, str(depth), role, shown])
    return rows


@example
def record_pairs(page: Json) -> Rows:
    _, extension = Encoder(VOCABULARY).encode_outline(outline(page("record")))
    return [
        [piece.text, VOCABULARY.tokens[token_id], f"({token_id}, {sub})"]
        for piece, (token_id, sub) in zip(extension.pieces, extension.pairs, strict=True)
    ]


@example
def relations(page: Json) -> Rows:
    texts, tree = outline(page("record"))
    return [
        [f"{i} {text}", *map(str, row)]
        for i, (text, row) in enumerate(zip(texts, tree.relations.tolist(), strict=True))
    ]


@example
def deep_relations(page: Json) -> Rows:
    nested: Any = "x"
    for _ in range(9):
        nested = {"a": nested}
    _, tree = outline({**nested, "<ans>": "x"})
    rows = []
    for depth in (0, 1, 2, 6, 7, 8, 10):
        segment = tree.depths.index(depth)
        pair = tree.relations[0, segment], tree.relations[segment, 0]
        rows.append([str(depth), *map(str, pair)])
    return rows


@example
def packed_row(page: Json) -> Rows:
    batch = batch_of(page("row"))
    target = dict(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True))
    spans = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    return [
        [
            str(j),
            str(spans[j]),
            str(int(batch.segments[j])),
            VOCABULARY.tokens[int(batch.ids[j])],
            str(int(batch.ids[j])),
            str(int(batch.subs[j])),
            "yes" if batch.context[j] else "no",
            str(target.get(j, -100)),
        ]
        for j in range(batch.num_tokens)
    ]


@example
def step_table(page: Json) -> Rows:
    batch = batch_of(page("row"))
    pairs = zip(batch.extension_ids.tolist(), batch.extension_subs.tolist(), strict=True)
    return [[str(len(VOCABULARY) + i), f"({a}, {b})"] for i, (a, b) in enumerate(pairs)]


@example
def best_fit_rows(page: Json) -> Rows:
    lengths = page("lengths")
    steps = best_fit(lengths, 2, 10)
    return [
        [str(s), " ".join(map(str, row)), str(sum(lengths[n] for n in row))]
        for s, step in enumerate(steps)
        for row in step.rows
    ]
