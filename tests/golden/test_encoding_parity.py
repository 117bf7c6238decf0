from __future__ import annotations

from pathlib import Path

from golden.recipe import read_lines

from cpm_bee.encoding import Encoder
from cpm_bee.segments import outline
from cpm_bee.tokenizer import Tokenizer


def test_encoding(golden: Path, vocabulary: Tokenizer) -> None:
    cases = read_lines(golden / "encoding.jsonl")
    assert cases
    encoder = Encoder(vocabulary)  # one for all: nothing of a record may reach the next
    for case in cases:
        encoded = encoder.encode(case["record"])
        assert encoded.ids.tolist() == case["ids"]
        assert encoded.subs.tolist() == case["subs"]
        assert encoded.segments.tolist() == case["segments"]
        assert encoded.context.astype(int).tolist() == case["context"]
        assert len(encoded.tree.depths) == case["num_segments"]
        assert encoded.tree.relations.ravel().tolist() == case["segment_rel"]


def test_extension_tables(golden: Path, vocabulary: Tokenizer) -> None:
    encoder = Encoder(vocabulary)
    sizes = []
    for case in read_lines(golden / "encoding.jsonl"):
        _, extension = encoder.encode_outline(outline(case["record"]))
        ids = [str(len(vocabulary) + i) for i in range(len(extension.pairs))]
        texts = [piece.text for piece in extension.pieces]
        assert dict(zip(ids, texts, strict=True)) == case["ext_table"]
        pairs: dict[str, dict[str, int]] = {}
        for token_id, (category, sub) in zip(ids, extension.pairs, strict=True):
            pairs.setdefault(vocabulary.tokens[category], {})[token_id] = sub
        assert pairs == case["token_id_table"]
        sizes.append(len(ids))
    assert max(sizes) > 3
