"""The loss of each record's answer, and whether generation would write it (one forward pass)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from cpm_bee.data.batch import Stream, extension_pairs, make_batch
from cpm_bee.encoding import AnswerState, EncodedRecord, Encoder, TokenLists
from cpm_bee.errors import RunError
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar
from cpm_bee.records import Record
from cpm_bee.segments import outline

MAX_TOKENS = 8192  # in a batch, by default


class RecordScores(NamedTuple):
    """The scores of n records whose answers are known."""

    losses: np.ndarray  # (n,) float64, cross entropy summed over the tokens of the answers
    targets: np.ndarray  # (n,) int64, tokens of the answers with their </s>
    correct: np.ndarray  # (n,) int64, of them, those that are the most probable ones
    is_exact: np.ndarray  # (n,) bool, generation with beam size 1 writes this answer


def check_finite(values: np.ndarray) -> None:
    """Raise `RunError` if log probabilities or losses are not finite: the weights are broken."""
    if not np.isfinite(values).all():
        raise RunError(
            "the model's logits are not finite: the weights are broken, or the range of "
            "--dtype is too small for them (--dtype fp32 has the largest)"
        )


def is_writable(record: Record, encoder: Encoder) -> bool:
    """Whether generation can write the answer of a record."""
    segments = outline(record)
    extension = encoder.append(segments, TokenLists())
    return bool(encoder.answer_state(segments, extension) & AnswerState.WRITABLE)


def groups_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yields groups of numbers of similar lengths, longest first, of at most `max_tokens` each."""
    group: list[int] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and tokens + lengths[number] > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += lengths[number]
    if group:
        yield group


@torch.inference_mode()
def score_records(
    model: CPMBee,
    encoder: Encoder,
    records: Sequence[Record],
    *,
    max_tokens: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RecordScores:
    """Score the answers of records; exact matches are those of evaluation during training.

    The scores of a record do not depend on the others. Hazard: the loss during training does,
    slightly, because there the extension entries of all records of a step compete.

    Args:
        max_tokens: the most tokens in a batch; a longer record is a batch of its own.

    Raises:
        InputError: a special token of a record has a name that the vocabulary lacks.
        RunError: the model's logits are not finite.
    """
    model.eval()
    device = model.input_embedding.weight.device
    encoded = [encoder.encode_as_generated(record) for record in records]
    count = len(records)
    losses = np.zeros(count)
    targets, correct, wrong = (np.zeros(count, dtype=np.int64) for _ in range(3))
    with progress_bar(total=count, description="scoring", unit="records") as bar:
        for group in groups_by_length(list(map(len, encoded)), max_tokens):
            own = [encoded[number] for number in group]
            batch = _batch(own, encoder).to(device)
            with autocast():
                scores = model.score(batch)
            record_of = np.array(group)[batch.target_records.cpu().numpy()]  # (N,)
            is_correct = scores.correct.cpu().numpy()
            own_losses = scores.losses.double().cpu().numpy()
            check_finite(own_losses)
            np.add.at(losses, record_of, own_losses)
            np.add.at(targets, record_of, 1)
            np.add.at(correct, record_of, is_correct)
            np.add.at(wrong, record_of, ~is_correct)
            bar.update(len(group))
    writable = np.array([is_writable(record, encoder) for record in records], dtype=bool)
    return RecordScores(losses, targets, correct, (wrong == 0) & writable)


def _batch(records: Sequence[EncodedRecord], encoder: Encoder) -> Any:
    return make_batch(
        Stream.of(records),
        encoder.tokenizer,
        extension_pairs(records),
        as_generated=True,
        own_extension=True,
    )
