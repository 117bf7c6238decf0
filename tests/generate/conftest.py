"""A vocabulary and models small enough to search through by brute force."""

from __future__ import annotations

import pytest
import torch

from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer

RESERVED_TOKENS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>"]
RESERVED_TOKENS += ["<root>", "<ans>", "<option>"]
PLAIN = ["<", ">", "input", "question", "x", "y", "ab", "甲", "乙", "丙", "甲乙"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(RESERVED_TOKENS + PLAIN)


def make_model(tokenizer: Tokenizer, seed: int, masks: tuple = ()) -> CPMBee:
    """A random model in double precision, so that near ties hardly depend on rounding."""
    config = ModelConfig(
        vocab_size=len(tokenizer),
        dim_model=16,
        num_heads=2,
        dim_head=6,
        dim_ff=20,
        num_layers=3,
        mask_modules=masks,
        dropout_p=0.5,  # must not act
    )
    model = CPMBee(config)
    model.load_state_dict(dict(initial_values(model, seed)))
    return model.double()


@pytest.fixture(scope="session")
def tiny_models(tiny_tokenizer: Tokenizer) -> list[CPMBee]:
    pruned = ((False, True), (True, False), (False, False))
    models = [make_model(tiny_tokenizer, 0), make_model(tiny_tokenizer, 1, pruned)]
    # A third one that likes to end its answers, so that many hypotheses finish early.
    model = make_model(tiny_tokenizer, 2)
    with torch.no_grad():
        model.input_embedding.weight[tiny_tokenizer.eos] *= 4
    return [m.eval() for m in (*models, model)]


@pytest.fixture(scope="session")
def tiny_model(tiny_models: list[CPMBee]) -> CPMBee:
    return tiny_models[0]
