"""Sample answers of an evaluation, for people.

They cost no pass of the model. An evaluation knows the most probable token at every target, given
the right tokens before it. As far as these tokens are right, and with the first wrong one, that is
what generation with beam size 1 writes. From there on generation would go its own way, so the
sample ends there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cpm_bee.data.batch import Batch, Pair
from cpm_bee.encoding import Encoder
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.loss import Scores
from cpm_bee.records import ANSWER, Record, Tree, options_of
from cpm_bee.train.data_loader import DataLoader

_MAX_TEXT = 400  # characters


@dataclass(frozen=True)
class Sample:
    """A record and its answer, as texts; long ones are cut.

    Attributes:
        number: of the record in its data set.
        written: up to its first wrong token; "…" stands for what would follow.
        is_correct: as exact match counts it.
    """

    number: int
    context: str
    expected: str
    written: str
    is_correct: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def samples_of(
    loader: DataLoader, numbers: Sequence[int], batch: Batch, scores: Scores
) -> list[Sample]:
    """Returns samples of the first records of a batch.

    Args:
        numbers: the numbers of these records.
        scores: of all targets of the batch, which was made `as_generated`.
    """
    encoder = Encoder(loader.tokenizer)
    # Of the targets of these records: the copies to the CPU are small.
    chosen = (batch.target_records < len(numbers)).nonzero().flatten()
    records, best, correct = (
        t[chosen].tolist() for t in (batch.target_records, scores.best, scores.correct)
    )
    segments = batch.segments[batch.target_positions[chosen]].tolist()
    extension = torch.stack([batch.extension_ids, batch.extension_subs], dim=1).tolist()
    writable = loader.is_writable(numbers)
    samples = []
    for i, number in enumerate(numbers):
        own = [at for at, record in enumerate(records) if record == i]
        record = loader.record(number)
        prompt = Prompt.of(record, encoder)
        texts, is_right = _written(
            prompt,
            [
                (
                    segments[at],
                    (best[at], 0)
                    if best[at] < len(loader.tokenizer)
                    else tuple(extension[best[at] - len(loader.tokenizer)]),
                    correct[at],
                )
                for at in own
            ],
            (loader.tokenizer.eos, 0),
        )
        samples.append(
            Sample(
                number=number,
                context=_cut("\n".join(_lines({k: v for k, v in record.items() if k != ANSWER}))),
                expected=_answer(record),
                written=_answer(fill_answers(record, texts)),
                is_correct=is_right and bool(writable[i]),
            )
        )
    return samples


def _written(
    prompt: Prompt, predictions: Sequence[tuple[int, Pair, bool]], eos: Pair
) -> tuple[list[str], bool]:
    """Returns the texts of the answers of a record, and whether all tokens are right.

    Args:
        predictions: at each target its segment, the most probable token, and whether it is right.
    """
    tokens: dict[int, list[Pair]] = {segment: [] for segment in prompt.answers}
    last = None  # the answer with the first wrong token
    goes_on = False  # beyond that token
    for segment, pair, is_right in predictions:
        if pair != eos:
            tokens[segment].append(pair)
        if not is_right:
            last, goes_on = segment, pair != eos
            break
    texts = [prompt.text(tokens[segment]) for segment in prompt.answers]
    if last is not None:
        at = prompt.answers.index(last)
        texts[at] += "…" if goes_on else ""
        texts[at + 1 :] = ["…"] * len(texts[at + 1 :])
    return texts, last is None


def _lines(node: Mapping[str, Tree]) -> Iterator[str]:
    """The leaves of a record, `key: text`, those of dictionaries below their key."""
    for key, value in node.items():
        if isinstance(value, str):
            yield f"{key}: {value}"
        else:
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(value))


def _answer(record: Record) -> str:
    """The answer of a record as text; of a choice, the text of its option too."""
    answer = record[ANSWER]
    if not isinstance(answer, str):
        return _cut("\n".join(_lines(answer)))
    option = options_of(record).get(answer.removesuffix("…"))
    return _cut(answer if option is None else f"{answer.removesuffix('…')} → {option}")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
