"""Sample answers of an evaluation, for people.

They cost no pass of the model. An evaluation knows the most probable token at every target, given
the right tokens before it. As far as these tokens are right, and with the first wrong one, that is
what generation with beam size 1 writes. From there on generation would go its own way, so the
sample ends there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cpm_bee.data.batch import Batch, Pair
from cpm_bee.encoding import Encoder
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.loss import Scores
from cpm_bee.records import ANSWER, Record
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
                context=_text({k: v for k, v in record.items() if k != ANSWER}),
                expected=_text(record[ANSWER]),
                written=_text(fill_answers(record, texts)[ANSWER]),
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


def _text(value: Record | str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
