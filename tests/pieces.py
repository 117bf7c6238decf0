"""Splits a text into pieces, for tests that look at each one; encoding does not make them."""

from __future__ import annotations

from cpm_bee.tokenizer import NEWLINE, SPACE, Piece, Tokenizer, split_markup

_SPELLED = {NEWLINE: "\n", SPACE: " "}


def split_pieces(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """Split a text into pieces. Raises `MarkupError`."""
    result = []
    for part, is_special in split_markup(text):
        if is_special:
            result.append(Piece(part, False, True))
            continue
        ids, unknown = tokenizer.match(part)
        runs = iter(unknown)
        for i in ids:
            known = _SPELLED.get(tokenizer.tokens[i], tokenizer.tokens[i])
            result.append(Piece(next(runs) if i < 0 else known, i < 0, False))
    return result
