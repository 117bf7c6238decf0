"""Texts that end an answer where they appear in it, and that are not part of what is returned."""

from __future__ import annotations

from typing import NamedTuple

from cpm_bee.tokenizer import unescape


class StopSequences(NamedTuple):
    """The sequences of a record, plain texts: a literal `<` is `<`, none is empty."""

    texts: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """The number of characters of the longest one, or 0."""
        return max(map(len, self.texts), default=0)

    def end_of(self, escaped: str) -> int | None:
        """Where an answer ends, as a number of characters of its plain text; None if it goes on.

        Args:
            escaped: its text by whole tokens, with `<` as `<<`.
        """
        text = unescape(escaped)
        found = [at for stop in self.texts if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def plain(self, escaped: str) -> str:
        """The plain text of a finished answer, up to the first of the sequences."""
        return unescape(escaped)[: self.end_of(escaped)]

    def plain_so_far(self, escaped: str) -> str:
        """The plain text of an unfinished answer, as far as no later token takes it back.

        What may be the beginning of a sequence is held back.
        """
        text = self.plain(escaped)
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.texts):
                return text[:-length]
        return text


NO_STOPS = StopSequences()
