"""Record -> tokens (docs/format.md §3)."""

from __future__ import annotations

import enum
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from cpm_bee.errors import InputError
from cpm_bee.records import Record, special_tokens
from cpm_bee.segments import MAX_SEGMENTS, Outline, SegmentTree, SpanTree, outline
from cpm_bee.tokenizer import ExtensionTable, Piece, Tokenizer

MAX_PARTS = np.iinfo(np.uint16).max  # segments and subs are stored in 16 bits

# Texts up to this length are looked up in a cache: field names, options, the question.
_CACHED_LENGTH = 24
_CACHE_SIZE = 4_096


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """The n tokens of a record.

    Attributes:
        ids: vocabulary ids, int32 [n].
        subs: the number of a token's extension entry among those that share its id (0 for
            ordinary tokens), uint16 [n].
        segments: the segment of each token, uint16 [n].
        tree: the segments' depths and roles.
    """

    ids: np.ndarray
    subs: np.ndarray
    segments: np.ndarray
    tree: SegmentTree | SpanTree

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> np.ndarray:
        """True where a token is given, False where it belongs to an answer; bool [n]."""
        return ~np.asarray(self.tree.predicted, dtype=bool)[self.segments]


class AnswerState(enum.IntFlag):
    """Whether generation can write a record's answer; 0 if the answer is not known.

    A record is encoded in the order of its fields, including the answer; generation encodes only
    the context. Both number the extension entries in order of appearance, so an answer that
    precedes context may shift the numbers (`RENUMBERED`). An answer that adds entries, such as
    characters that are not in the vocabulary, can be trained on but never generated (not
    `WRITABLE`).
    """

    KNOWN = 1  # there is an answer
    WRITABLE = 2  # generation has candidates for all of its tokens
    RENUMBERED = 4  # generation numbers the record's extension entries differently


class Extension(ExtensionTable):
    """A record's extension table with the (id, sub) pair of each entry.

    Attributes:
        pairs: the (id, sub) pair of each entry.
        answers_added: whether an answer added an entry.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(len(tokenizer))
        self._tokenizer = tokenizer
        self._counts: dict[int, int] = {}
        self.pairs: list[tuple[int, int]] = []
        self.answers_added = False

    def id_of(self, piece: Piece) -> int:
        if piece not in self._ids:
            self.pair_of(piece, self._tokenizer.category(piece))
        return super().id_of(piece)

    def pair_of(self, piece: Piece, category: int) -> tuple[int, int]:
        """The pair of a piece whose `Tokenizer.category` is known; adds the piece if it is new."""
        token_id = self._ids.get(piece)
        if token_id is not None:
            return self.pair(token_id)
        super().id_of(piece)
        sub = self._counts.get(category, 0)
        self._counts[category] = sub + 1
        self.pairs.append((category, sub))
        return category, sub

    def pair(self, token_id: int) -> tuple[int, int]:
        return self.pairs[token_id - self._vocab_size]


@dataclass(slots=True)
class TokenLists:
    """The tokens of consecutive records, while they are being encoded.

    Attributes:
        ids: the vocabulary id of each token.
        segment_lengths: the number of tokens of each segment.
        subs: (position in `ids`, sub) of the tokens whose sub is not 0.
    """

    ids: list[int] | array[int] = field(default_factory=list)
    segment_lengths: list[int] | array[int] = field(default_factory=list)
    subs: list[tuple[int, int]] = field(default_factory=list)


class Encoder:
    """Encodes records with one vocabulary; not thread-safe.

    Args:
        samples: valid records with answers that follow each record as its in-context samples
            (docs/format.md §5.5). They share its extension, whose first entries are the record's.
    """

    def __init__(self, tokenizer: Tokenizer, samples: Sequence[Record] = ()) -> None:
        self.tokenizer = tokenizer
        self._samples = [outline(record) for record in samples]
        self._ordinary: dict[str, list[int]] = {}  # texts without extension entries
        self._markup: dict[str, tuple[Piece, int]] = {}  # texts that are one unlisted special token

    def encode(
        self,
        record: Record,
        *,
        rng: random.Random | None = None,
        answers: bool = True,
        samples: Sequence[Record] = (),
    ) -> EncodedRecord:
        """Encode a valid record (see `records.validate`).

        Args:
            rng: shuffles the dictionaries under `<ans>`, as in training.
            answers: if false, predicted segments keep their number but have no tokens, as in the
                prompt for generation.
            samples: in-context samples of this record, after those of all records.

        Raises:
            InputError: a special token has a name that is not in the vocabulary, or the record has
                more than 4,096 segments or 65,535 extension entries.
        """
        own, *more = (outline(each, rng) for each in (record, *samples))
        return self.encode_outline(own, answers=answers, samples=more)[0]

    def encode_outline(
        self,
        segments: Outline,
        *,
        answers: bool = True,
        extension: Extension | None = None,
        samples: Sequence[Outline] = (),
    ) -> tuple[EncodedRecord, Extension]:
        """Like `encode`, from segments; also returns the record's extension, for decoding."""
        tokens = TokenLists()
        extension = self.append(segments, tokens, answers=answers, extension=extension)
        samples = [*self._samples, *samples]
        self._append_samples(segments, tokens, extension, samples)
        trees = tuple(sample.tree for sample in samples)
        subs = np.zeros(len(tokens.ids), dtype=np.uint16)
        for position, sub in tokens.subs:
            subs[position] = sub
        encoded = EncodedRecord(
            ids=np.array(tokens.ids, dtype=np.int32),
            subs=subs,
            segments=_numbers(len(tokens.segment_lengths)).repeat(tokens.segment_lengths),
            tree=SpanTree(segments.tree, trees) if trees else segments.tree,
        )
        return encoded, extension

    def encode_as_generated(self, record: Record) -> EncodedRecord:
        """Encode a record with its extension entries numbered as in generation.

        The context's entries come first, then those that the answers add.
        """
        segments = outline(record)
        return self.encode_outline(segments, extension=self._prompt_extension(segments))[0]

    def _prompt_extension(self, segments: Outline) -> Extension:
        """The extension of a record without its answers, and of the in-context samples."""
        extension = self.append(segments, TokenLists(), answers=False)
        self._append_samples(segments, TokenLists(), extension, self._samples)
        return extension

    def _append_samples(
        self,
        segments: Outline,
        tokens: TokenLists,
        extension: Extension,
        samples: Sequence[Outline],
    ) -> None:
        added = extension.answers_added
        for sample in samples:
            self.append(sample, tokens, extension=extension)
        extension.answers_added = added
        count = len(segments.texts) + sum(len(sample.texts) for sample in samples)
        if samples and count > MAX_SEGMENTS:
            raise InputError(
                f"the record and its examples have {count:,} fields, more than {MAX_SEGMENTS:,}"
            )

    def answer_state(self, segments: Outline, extension: Extension) -> AnswerState:
        """Whether generation can write a record's answer.

        Args:
            extension: the result of `append` for the whole record.
        """
        pairs = zip(segments.texts, segments.tree.predicted, strict=True)
        answers = [text for text, is_predicted in pairs if is_predicted]
        if not any(answers):
            return AnswerState(0)
        listed = self.tokenizer.specials
        plain = not any(t in listed for text in answers for t in special_tokens(text))
        if plain and not extension.answers_added:
            return AnswerState.KNOWN | AnswerState.WRITABLE
        vocab_size = len(self.tokenizer)
        prompt = self._prompt_extension(segments)
        state = AnswerState.KNOWN
        if any(extension.pair_of(p, 0) != prompt.pair_of(p, 0) for p in list(prompt.pieces)):
            state |= AnswerState.RENUMBERED
        # Generated pairs are converted back as in `generate.prompt.Prompt.text`.
        numbers = {pair: vocab_size + i for i, pair in enumerate(prompt.pairs)}
        size = len(prompt)
        written = [self.tokenizer.encode(text, prompt) for text in answers]
        if len(prompt) == size and all(
            numbers.get((i, 0), i) == i for ids in written for i in ids if i < vocab_size
        ):
            state |= AnswerState.WRITABLE
        return state

    def unwritable_pieces(self, record: Record) -> list[str]:
        """The parts of a record's answer that generation cannot write (`AnswerState.WRITABLE`)."""
        texts, tree = segments = outline(record)
        prompt = self._prompt_extension(segments)
        size = len(prompt)
        taken = {category for category, sub in prompt.pairs if sub == 0}
        found: dict[str, None] = {}
        for text, is_predicted in zip(texts, tree.predicted, strict=True):
            if is_predicted:
                ids = self.tokenizer.encode(text, prompt)
                found.update((self.tokenizer.tokens[i], None) for i in ids if i in taken)
        found.update((piece.text, None) for piece in prompt.pieces[size:])
        return list(found)

    def append(
        self,
        segments: Outline,
        tokens: TokenLists,
        *,
        answers: bool = True,
        extension: Extension | None = None,
    ) -> Extension:
        """Append a record's tokens to `tokens`; on an error (see `encode`), `tokens` is unchanged.

        Returns the record's extension: `extension`, if given, plus the record's own entries.
        """
        ids, lengths, subs = tokens.ids, tokens.segment_lengths, tokens.subs
        before = len(ids), len(lengths), len(subs)
        extension = Extension(self.tokenizer) if extension is None else extension
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        ordinary_get, markup_get = self._ordinary.get, self._markup.get
        try:
            for text, is_predicted in zip(segments.texts, segments.tree.predicted, strict=True):
                if is_predicted and not answers:
                    lengths.append(0)
                    continue
                known = len(extension)
                if (segment := ordinary_get(text)) is None:
                    if (markup := markup_get(text)) is not None:
                        category, sub = extension.pair_of(*markup)
                        segment = [bos, category, eos]
                        if sub:
                            subs.append((len(ids) + 1, sub))
                    else:
                        segment = self._segment(text, extension, len(ids), subs)
                if is_predicted:
                    segment = segment[:-1]
                    if len(extension) > known:
                        extension.answers_added = True
                ids.extend(segment)
                lengths.append(len(segment))
            if len(segments.texts) > MAX_SEGMENTS:
                raise InputError(f"the record has more than {MAX_SEGMENTS} fields")
            if len(extension) > MAX_PARTS:
                raise InputError(f"the record has more than {MAX_PARTS} unknown words")
        except InputError:
            for values, count in zip((ids, lengths, subs), before, strict=True):
                del values[count:]
            raise
        return extension

    def _segment(
        self, text: str, extension: Extension, begin: int, subs: list[tuple[int, int]]
    ) -> list[int]:
        """The ids of a segment that begins at token `begin`, including `<s>` and `</s>`."""
        tokenizer = self.tokenizer
        if "<" not in text:
            ids, unknown = tokenizer.match(text)
            if not unknown:
                return self._remember(text, [tokenizer.bos, *ids, tokenizer.eos])
        ids = tokenizer.encode(text, extension)
        segment = [tokenizer.bos, *ids, tokenizer.eos]
        vocab_size = len(tokenizer)
        if max(segment) < vocab_size:
            return self._remember(text, segment)
        # Extension ids are valid within one record only, so just the fact that the text is one
        # special token can be cached.
        if len(ids) == 1 and (piece := extension[ids[0]]).is_special:
            if len(self._markup) >= _CACHE_SIZE:
                self._markup.clear()
            self._markup[text] = piece, extension.pair(ids[0])[0]
        for i, token_id in enumerate(ids, start=1):
            if token_id >= vocab_size:
                segment[i], sub = extension.pair(token_id)
                if sub:
                    subs.append((begin + i, sub))
        return segment

    def _remember(self, text: str, segment: list[int]) -> list[int]:
        if len(text) <= _CACHED_LENGTH:
            if len(self._ordinary) >= _CACHE_SIZE:
                self._ordinary.clear()
            self._ordinary[text] = segment
        return segment


@lru_cache(maxsize=256)
def _numbers(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint16)
