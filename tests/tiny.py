"""A vocabulary, models and records small enough for slow references and many examples."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st

from cpm_bee.data.batch import Batch
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.records import ANSWER, Record, validate
from cpm_bee.tokenizer import Tokenizer

RESERVED_TOKENS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>"]
RESERVED_TOKENS += ["<root>", "<ans>", "<option>"]
PLAIN = ["<", ">", "input", "question", "a", "b", "ab", "x", "春", "天", "春天", "风"]
TOKENIZER = Tokenizer([*RESERVED_TOKENS, *PLAIN], source="tiny vocabulary")


def make_config(**changes: Any) -> ModelConfig:
    """Returns a config whose sizes all differ, and in which distances from 4 on share buckets."""
    values: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "dim_model": 12,
        "num_heads": 2,
        "dim_head": 5,
        "dim_ff": 14,
        "num_layers": 2,
        "position_bias_num_buckets": 16,
        "position_bias_num_segment_buckets": 64,
        "position_bias_max_distance": 50,
    }
    return ModelConfig(**{**values, **changes})


def make_model(seed: int = 0, **changes: Any) -> CPMBee:
    """Returns a model with independent weights, so that each of them affects the results."""
    model = CPMBee(make_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            w = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * w if "layernorm" in name else w)
    return model.eval()


def hidden_states(model: CPMBee, batch: Batch) -> torch.Tensor:
    """Returns the states of all tokens after the last norm, [T, dim_model]."""
    h = model.input_embedding(batch.ids, batch.subs)
    h = model.encoder(h, model.attention_over(batch, h))
    return model.encoder.output_layernorm(h)


def encode(records: Sequence[Any]) -> list[EncodedRecord]:
    encoder = Encoder(TOKENIZER)
    return [encoder.encode(record) for record in records]


def write_vocabulary(path: Path, tokenizer: Tokenizer = TOKENIZER) -> Path:
    path.write_text("\n".join(tokenizer.tokens), encoding="utf-8")
    return path


def anonymous_memory() -> int:
    """Returns the bytes of this process's memory that belong to no mapped file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


class _Mallinfo2(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_memory() -> int:
    """Returns the bytes that malloc has handed out: tensors, but no mapped files or small objects.

    Unlike the pages of a process, it does not depend on what the allocator keeps for later.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


# Known and unknown stretches, specials in and beyond the vocabulary; any sequence is well formed.
_STRETCHES = [*PLAIN[1:], " ", "\n", "<<", "é", "ü", "éü", "漢", "<mask>", "<ans>", "</s>"]
_STRETCHES += [f"<{name}_{i}>" for name in ("mask", "option", "sep") for i in range(3)]
texts = st.lists(st.sampled_from(_STRETCHES), max_size=5).map("".join)


def chain(key: str, depth: int, tree: Any) -> Any:
    for _ in range(depth):
        tree = {key: tree}
    return tree


_wide = st.recursive(texts, lambda inner: st.dictionaries(texts, inner, max_size=3), max_leaves=5)
_deep = st.builds(chain, texts, st.integers(6, 14), _wide)
trees = _wide | _deep


def _has_leaf(tree: Any) -> bool:
    return isinstance(tree, str) or any(map(_has_leaf, tree.values()))


@st.composite
def encodable_records(draw: st.DrawFn) -> Record:
    """Records with the answer anywhere; trees of more than 8 levels, nested and empty answers.

    They are encoded as the reference does; some hold what `records.validate` refuses.
    """
    context = draw(st.dictionaries(texts.filter(lambda key: key != "<ans>"), trees, max_size=3))
    return dict(draw(st.permutations([*context.items(), ("<ans>", draw(trees.filter(_has_leaf)))])))


def records() -> st.SearchStrategy[Record]:
    """The records of `encodable_records` without what `records.validate` refuses."""
    return encodable_records().map(_made_valid)


def _made_valid(record: Record) -> Record:
    """Replace control tokens with others, and special tokens of only the answer with a letter."""

    def renamed(tree: Any) -> Any:
        if isinstance(tree, str):
            return re.sub(r"<(/s|ans|sep)(_\d)?>", lambda m: f"<option{m[2] or '_4'}>", tree)
        return {renamed(key): renamed(value) for key, value in tree.items()}

    def keys(tree: Any) -> str:
        if isinstance(tree, str):
            return ""
        return "".join(key + keys(value) for key, value in tree.items())

    def cleared(tree: Any) -> Any:
        if isinstance(tree, str):
            return re.sub(r"<\w+_\d>", lambda m: m[0] if m[0] in known else "a", tree)
        return {key: cleared(value) for key, value in tree.items()}

    record = {k if k == ANSWER else renamed(k): renamed(v) for k, v in record.items()}
    known = str([(k, v) for k, v in record.items() if k != ANSWER]) + keys(record[ANSWER])
    record[ANSWER] = cleared(record[ANSWER])
    assert validate(record) == []
    return record
