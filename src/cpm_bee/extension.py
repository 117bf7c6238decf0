"""A record's extension table: how the model sees what the vocabulary lacks (docs/format.md §3)."""

from __future__ import annotations

from cpm_bee.tokenizer import ExtensionTable, Piece, Tokenizer


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
