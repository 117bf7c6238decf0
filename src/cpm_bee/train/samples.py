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

from cpm_bee.data.batch import Batch
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
        is_whole: whether `written` is all that would be written.
        is_correct: as exact match counts it.
    """

    number: int
    context: str
    expected: str
    written: str
    is_whole: bool
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
        parts: dict[int, list[tuple[int, int]]] = {segment: [] for segment in prompt.answers}
        is_right = is_whole = True
        for at in own:
            token = best[at] - len(loader.tokenizer)
            pair = (best[at], 0) if token < 0 else tuple(extension[token])
            if pair != (loader.tokenizer.eos, 0):
                parts[segments[at]].append(pair)
            if not correct[at]:
                is_right = False
                is_whole = pair == (loader.tokenizer.eos, 0) and segments[at] == segments[own[-1]]
                break
        texts = [prompt.text(parts[segment]) for segment in prompt.answers]
        written = fill_answers(record, texts)[ANSWER]
        samples.append(
            Sample(
                number=number,
                context=_text({k: v for k, v in record.items() if k != ANSWER}),
                expected=_text(record[ANSWER]),
                written=_text(written),
                is_whole=is_whole,
                is_correct=is_right and bool(writable[i]),
            )
        )
    return samples


def _text(value: Record | str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
