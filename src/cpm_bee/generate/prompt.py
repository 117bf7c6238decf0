"""A record as a prompt, and its answers from generated tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cpm_bee.data.batch import Pair
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.extension import Extension
from cpm_bee.records import ANSWER, Record, Tree
from cpm_bee.segments import outline
from cpm_bee.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A record without its answer texts.

    Attributes:
        encoded: the context; answer leaves are segments without tokens.
        answers: the segment of each answer leaf, in walk order.
    """

    encoded: EncodedRecord
    answers: tuple[int, ...]
    _tokenizer: Tokenizer
    _extension: Extension
    _extension_numbers: dict[Pair, int]  # (id, sub) -> its id in the extension table

    @classmethod
    def of(cls, record: Record, encoder: Encoder) -> Prompt:
        """Encode a valid record (see `records.validate`); answer texts are ignored.

        Raises `InputError` for a special token whose name the vocabulary lacks.
        """
        segments = outline(record)
        encoded, extension = encoder.encode_outline(segments, answers=False)
        answers = tuple(i for i, predicted in enumerate(segments.tree.predicted) if predicted)
        first = len(encoder.tokenizer)
        numbers = {pair: first + i for i, pair in enumerate(extension.pairs)}
        return cls(encoded, answers, encoder.tokenizer, extension, numbers)

    @property
    def has_unknown(self) -> bool:
        """Whether the context has text that the vocabulary lacks, which `<unk>` then represents."""
        return (self._tokenizer.unk, 0) in self._extension_numbers

    @property
    def started(self) -> EncodedRecord:
        """The context followed by the `<s>` of the first answer."""
        encoded, bos = self.encoded, self._tokenizer.bos
        return EncodedRecord(
            ids=np.append(encoded.ids, np.int32(bos)),
            subs=np.append(encoded.subs, np.uint16(0)),
            segments=np.append(encoded.segments, np.uint16(self.answers[0])),
            tree=encoded.tree,
        )

    def pair_of(self, token: str) -> Pair:
        """The (id, sub) pair of a special token of the context."""
        [token_id] = self._tokenizer.encode(token, self._extension)
        is_listed = token_id < len(self._tokenizer)
        return (token_id, 0) if is_listed else self._extension.pair(token_id)

    def text(self, tokens: Sequence[Pair]) -> str:
        """Returns the text of (id, sub) pairs; extension entries mean what they do in the record.

        This includes sub 0: if the record has an unknown run 𠮷, `<unk>` is 𠮷.
        """
        ids = [self._extension_numbers.get(pair, pair[0]) for pair in tokens]
        return self._tokenizer.decode(ids, self._extension)


def fill_answers(record: Record, texts: Sequence[str | None]) -> dict:
    """Returns a copy of a record with its answer leaves replaced, in walk order."""
    remaining = iter(texts)
    return {k: _fill_node(v, remaining) if k == ANSWER else v for k, v in record.items()}


def _fill_node(node: Tree, texts: Iterator[str | None]) -> dict | str | None:
    if isinstance(node, str):
        return next(texts)
    return {key: _fill_node(value, texts) for key, value in node.items()}
