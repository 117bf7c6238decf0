"""What the examples share: the vocabulary, small sizes, ways of writing numbers, the register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from support import ROOT

from cpm_bee.data.batch import Batch, collate
from cpm_bee.encoding import Encoder
from cpm_bee.model.config import ModelConfig
from cpm_bee.tokenizer import Tokenizer

Rows: TypeAlias = list[list[str]]
Json: TypeAlias = Callable[[str], Any]  # gives the value of a named JSON block of the page
Example: TypeAlias = Callable[[Json], "Rows | list[str]"]

TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"
VOCABULARY = Tokenizer.load(TINY / "vocab.txt")
EXAMPLES: dict[str, Example] = {}


def example(function: Example) -> Example:
    """Register an example under the name of its function, with hyphens."""
    EXAMPLES[function.__name__.replace("_", "-")] = function
    return function


def number(value: float) -> str:
    """Four decimals, and no minus sign before zero."""
    return f"{value:.4f}".replace("-0.0000", "0.0000")


def numbers(values: Sequence[float]) -> str:
    return ", ".join(map(number, values))


def config(**changes: Any) -> ModelConfig:
    sizes = {"dim_model": 4, "num_heads": 2, "dim_head": 2, "dim_ff": 2, "num_layers": 1}
    return ModelConfig(**{"vocab_size": len(VOCABULARY), **sizes, **changes})


def batch_of(records: Sequence[Any]) -> Batch:
    encoder = Encoder(VOCABULARY)
    return collate([encoder.encode(record) for record in records], VOCABULARY)
