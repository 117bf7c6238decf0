"""Choosing among the options of a record by the probability of each as the answer.

The probability of an option is that of writing its special token and then `</s>`, among the options
of the record. The context is run once; then one step runs a beam for each option, for many records
together. With `orders` above 1, each record is scored with its options in several orders, and the
probabilities of each option's text are averaged: models prefer some places in the list whatever
stands there (Zheng et al. 2024, "Large Language Models Are Not Robust Multiple Choice Selectors").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cpm_bee.encoding import Encoder
from cpm_bee.generate.beams import Beams
from cpm_bee.generate.decoder import Decoder, Shape
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.scoring import check_finite, groups_by_length
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, Record, Tree, options_of


class Choice(NamedTuple):
    """The options of a record with their probabilities."""

    probabilities: dict[str, float]  # by option token, in the order of the record; the sum is 1

    @property
    def best(self) -> str:
        """The most probable option; the first of equal ones."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


class _Variant(NamedTuple):
    """A record with its options in some order."""

    row: int  # of the record
    prompt: Prompt
    tokens: list[str]  # the special tokens of its options
    options: list[str]  # the record's option whose text each of them has


def has_choices(record: Record) -> bool:
    """Whether an option can be the answer: there are options, and one text as the answer."""
    return bool(_choices_of(record))


def _choices_of(record: Record) -> dict[str, str]:
    return options_of(record) if isinstance(record[ANSWER], str) else {}


def choose(
    model: CPMBee,
    encoder: Encoder,
    records: Sequence[Record],
    *,
    max_tokens: int,
    orders: int = 1,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    quiet: bool = False,
) -> list[Choice | None]:
    """Choose an option for each record; None for one that `has_choices` is false for.

    Args:
        max_tokens: the most tokens of prompts in a batch.
        orders: the number of orders of the options; the first is the record's own, the others are
            random. At most as many as there are.
        seed: of the random orders, together with the number of the record.
        numbers: of the records; from 0 by default.
        quiet: show no bar.

    Raises:
        InputError: a special token of a record has a name that the vocabulary lacks.
        RunError: the model's logits are not finite.
    """
    model.eval()
    variants: list[_Variant] = []
    for row, record in enumerate(records):
        own = list(_choices_of(record))
        rng = random.Random(f"{seed}/{numbers[row] if numbers is not None else row}")
        for order in _orders(own, orders, rng) if own else ():
            moved = _reordered(record, dict(zip(own, order, strict=True)))
            prompt = Prompt.of({**moved, ANSWER: ""}, encoder)
            variants.append(_Variant(row, prompt, own, order))
    decoder = Decoder(model, encoder.tokenizer)
    sums: list[dict[str, float]] = [dict.fromkeys(_choices_of(r), 0.0) for r in records]
    lengths = [len(variant.prompt.encoded) for variant in variants]
    with progress_bar(
        total=len(variants), description="choosing", unit="records", quiet=quiet
    ) as bar:
        for group in groups_by_length(lengths, max_tokens):
            own_variants = [variants[i] for i in group]
            for variant, log_p in zip(own_variants, _log_p(decoder, own_variants), strict=True):
                p = np.exp(log_p[: len(variant.options)] - log_p.max())
                for option, share in zip(variant.options, p / p.sum(), strict=True):
                    sums[variant.row][option] += float(share)
            bar.update(len(group))
    return [_normalized(own) if own else None for own in sums]


def _normalized(sums: dict[str, float]) -> Choice:
    total = sum(sums.values())
    return Choice({option: value / total for option, value in sums.items()})


@torch.inference_mode()
def _log_p(decoder: Decoder, variants: Sequence[_Variant]) -> np.ndarray:
    """The log probability of each option as the answer, [R, K]; -inf beyond a record's own."""
    tokenizer, slots = decoder.tokenizer, np.arange(len(variants))
    width = max(len(variant.options) for variant in variants)
    columns = max(len(variant.prompt.encoded) for variant in variants) + 1
    decoder.divide(Shape(len(variants), columns, 2 * width), width)
    beams = Beams(len(variants), width, 3, tokenizer.bos, tokenizer.eos)
    for slot in slots.tolist():
        beams.start(slot)
    candidates = np.full((len(variants), width), tokenizer.eos)
    exists = np.zeros((len(variants), width), dtype=bool)
    for row, variant in enumerate(variants):
        count = len(variant.options)
        candidates[row, :count] = [decoder.candidate(variant.prompt, t) for t in variant.tokens]
        exists[row, :count] = True

    def option(logits: torch.Tensor, before: torch.Tensor, part: slice) -> tuple:
        numbers = torch.from_numpy(candidates[part]).to(logits.device)
        total = logits.log_softmax(dim=1).gather(1, numbers)
        total.masked_fill_(~torch.from_numpy(exists[part]).to(logits.device), -torch.inf)
        return total, torch.zeros_like(numbers), numbers

    def end(logits: torch.Tensor, before: torch.Tensor, part: slice) -> tuple:
        total = before + logits.log_softmax(dim=1)[:, tokenizer.eos].unflatten(0, before.shape)
        parents = torch.arange(width, device=logits.device).expand(total.shape)
        return total, parents, torch.full_like(parents, tokenizer.eos)

    states = decoder.prefill([variant.prompt for variant in variants], slots.tolist())
    found = decoder.continuations(states, slots, beams.log_p[:, :1], width, option)
    going = np.zeros(len(variants), dtype=bool)
    # One answer, which does not end with the option: every option becomes a beam, in this order.
    beams.advance(slots, found, beams.choose(slots, found, np.ones_like(slots), going))
    states = decoder.step(beams, len(variants))
    log_p = decoder.continuations(states, slots, beams.log_p, width, end).log_p
    check_finite(log_p[exists])
    return np.where(exists, log_p, -np.inf)


def _orders(options: list[str], count: int, rng: random.Random) -> Iterator[list[str]]:
    seen: set[tuple[str, ...]] = set()
    possible = int(np.prod(np.arange(1, len(options) + 1, dtype=np.float64)).clip(max=1e9))
    order = options
    while len(seen) < min(count, possible):
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield order
        order = rng.sample(options, len(options))


def _reordered(record: Record, source: dict[str, str]) -> Record:
    """Returns a copy of a record in which each option has the text of option `source[option]`."""

    def moved(node: Tree) -> Tree:
        if not isinstance(node, dict):
            return node
        if node.keys() == source.keys():
            return {key: node[source[key]] for key in node}
        return {key: moved(value) for key, value in node.items()}

    return {key: value if key == ANSWER else moved(value) for key, value in record.items()}
