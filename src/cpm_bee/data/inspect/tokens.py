"""A record as the model sees it: its segments, and the tokens of each."""

from __future__ import annotations

from typing import NamedTuple

from cpm_bee.encoding import Encoder
from cpm_bee.records import Record
from cpm_bee.segments import outline


class Token(NamedTuple):
    """A token; `kind` is "text", "special" or "unknown"."""

    text: str
    kind: str


class Segment(NamedTuple):
    """A segment: its number is its place in the list."""

    depth: int
    is_target: bool
    tokens: list[Token]


def segments_of(record: Record, encoder: Encoder) -> list[Segment]:
    """The segments of a record, in their order.

    A token that the vocabulary lacks is shown with the number that tells it from others: `龘:1`.
    """
    segments = outline(record)
    encoded, extension = encoder.encode_outline(segments)
    pieces = dict(zip(extension.pairs, extension.pieces, strict=True))
    tokenizer = encoder.tokenizer
    found = [
        Segment(depth, is_target, [])
        for depth, is_target in zip(segments.tree.depths, segments.tree.predicted, strict=True)
    ]
    for token_id, sub, segment in zip(encoded.ids, encoded.subs, encoded.segments, strict=True):
        piece = pieces.get((int(token_id), int(sub)))
        spelled = tokenizer.decode([int(token_id)])
        if piece is not None:
            token = Token(f"{piece.text}:{sub}", "unknown" if piece.is_unknown else "special")
        else:
            is_special = tokenizer.tokens[int(token_id)] in tokenizer.specials
            token = Token(spelled.replace("<<", "<"), "special" if is_special else "text")
        found[int(segment)].tokens.append(token)
    return found
