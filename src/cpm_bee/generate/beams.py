"""The running hypotheses of all records, as arrays, and how a step of beam search changes them.

Each record has a slot, each slot `beam_size` beams. A beam is a row of tokens, newest last; a beam
that continues another one copies its row. The rows also say which beam wrote each token: its key is
in the column of that beam and step (`model/cached_attention.py`), and stays there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The columns of a token.
WRITER = 0  # the beam that wrote it; -1 for no token
ID = 1  # vocabulary id
SUB = 2  # number of the extension entry of its id; 0 for ordinary tokens
ANSWER = 3  # the number of its answer, from 0
POSITION = 4  # position within the answer; 0 is `<s>`
_SIZE = 5


class Continuations(NamedTuple):
    """The best continuations of R records, best first; a summed log p of -inf is none."""

    log_p: np.ndarray  # (R, k) fp32, summed over the tokens
    parents: np.ndarray  # (R, k) the beam that is continued
    ids: np.ndarray  # (R, k) vocabulary id of the next token
    subs: np.ndarray  # (R, k)


class Choice(NamedTuple):
    """What beam search makes of the continuations of R records."""

    finished: np.ndarray  # (R, k) bool, a hypothesis ends with this continuation
    closes: np.ndarray  # (R, k) bool, the continuation is `</s>`
    stops: np.ndarray  # (R, k) bool, it completes a stop sequence
    taken: np.ndarray  # (R, k) bool, it becomes a beam of the next step
    places: np.ndarray  # (R, k) the number of that beam


class Beams:
    """The beams of all slots.

    Attributes:
        tokens: (slots, beams, tokens, 5) int32, see the constants of this module.
        log_p: (slots, beams) fp32, summed log probability; -inf for a beam that does not exist.
        last: (slots,) the index of each slot's newest token.
    """

    def __init__(self, num_slots: int, beam_size: int, num_tokens: int, bos: int, eos: int) -> None:
        self.tokens = np.zeros((num_slots, beam_size, num_tokens, _SIZE), dtype=np.int32)
        self.log_p = np.zeros((num_slots, beam_size), dtype=np.float32)
        self.last = np.zeros(num_slots, dtype=np.int64)
        self._bos, self._eos = bos, eos

    def start(self, slot: int) -> None:
        """Begin with one beam, `<s>` of the first answer."""
        self.tokens[slot] = 0
        self.tokens[slot, :, :, WRITER] = -1
        self.tokens[slot, :, 0, WRITER] = 0
        self.tokens[slot, :, 0, ID] = self._bos
        self.log_p[slot] = -np.inf
        self.log_p[slot, 0] = 0
        self.last[slot] = 0

    def move(self, source: int, target: int) -> None:
        for array in (self.tokens, self.log_p, self.last):
            array[target] = array[source]

    def newest(self, num_slots: int) -> np.ndarray:
        """The newest token of each beam of the first slots, (R, B, 5)."""
        return self.tokens[np.arange(num_slots), :, self.last[:num_slots]]

    def written(self, num_slots: int) -> np.ndarray:
        """The tokens of the first slots, (R, B, A, 5), A the most that any of them has."""
        return self.tokens[:num_slots, :, : self.last[:num_slots].max() + 1]

    def recent_ids(self, slots: np.ndarray, window: int | None) -> np.ndarray:
        """The ids of the last `window` tokens of each beam, or of all, (R, B, n).

        A beam with fewer tokens repeats its first one.
        """
        last = self.last[slots]
        count = min(window or last.max() + 1, last.max() + 1)
        index = np.maximum(last[:, None] - np.arange(count), 0)  # (R, n)
        return self.tokens[slots[:, None], :, index, ID].swapaxes(1, 2)

    def choose(
        self,
        slots: np.ndarray,
        found: Continuations,
        num_answers: np.ndarray,
        is_last: np.ndarray,
        stops: np.ndarray | None = None,
    ) -> Choice:
        """Go through continuations, best first, until `beam_size` of them have become beams.

        Args:
            num_answers: of each record, [R].
            is_last: whether this is the last step of a record, which finishes all hypotheses, [R].
            stops: whether a continuation completes a stop sequence, [R, k]; none by default.
        """
        parents = self.tokens[slots[:, None], found.parents, self.last[slots][:, None]]  # (R, k, 5)
        closes = found.ids == self._eos
        closes_last = closes & (parents[:, :, ANSWER] + 1 == num_answers[:, None])
        if stops is None:
            stops = np.zeros_like(closes)
        ends = is_last[:, None] | closes_last | stops
        exists = found.log_p > -np.inf
        continues = exists & ~ends
        places = continues.cumsum(axis=1) - continues  # beams that are there before
        free = places < self.log_p.shape[1]
        return Choice(exists & ends & free, closes, stops, continues & free, places)

    def hypothesis(self, slot: int, found: Continuations, row: int, column: int) -> np.ndarray:
        """The tokens of a finished hypothesis, (n, 5), with the `<s>` but no `</s>` of answers."""
        tokens = self.tokens[slot, found.parents[row, column], : self.last[slot] + 1]
        if found.ids[row, column] == self._eos:
            return tokens.copy()
        return np.concatenate([tokens, self._following(tokens[-1:], found, (row, column))])

    def advance(self, slots: np.ndarray, found: Continuations, choice: Choice) -> None:
        """Make the chosen continuations the beams of these slots."""
        rows, columns = np.nonzero(choice.taken)
        places = choice.places[rows, columns]
        parents = np.zeros((len(slots), self.log_p.shape[1]), dtype=np.int64)  # (R, B)
        parents[rows, places] = found.parents[rows, columns]
        used = self.last[slots].max() + 1
        tokens = self.tokens[slots, :, :used]
        self.tokens[slots, :, :used] = np.take_along_axis(tokens, parents[:, :, None, None], axis=1)
        self.log_p[slots] = -np.inf
        self.log_p[slots[rows], places] = found.log_p[rows, columns]
        at = self.last[slots[rows]]
        following = self._following(
            self.tokens[slots[rows], places, at], found, (rows, columns)
        )  # (n, 5)
        following[:, WRITER] = places
        # Of a beam that does not exist, the token is any: it repeats the last one.
        self.tokens[slots, :, self.last[slots] + 1] = self.tokens[slots, :, self.last[slots]]
        self.tokens[slots[rows], places, at + 1] = following
        self.last[slots] += 1

    def _following(self, last: np.ndarray, found: Continuations, at: tuple) -> np.ndarray:
        """The tokens that follow (n, 5) tokens; after `</s>`, it is `<s>` of the next answer."""
        closes = found.ids[at] == self._eos
        following = np.zeros_like(last)
        following[:, ID] = np.where(closes, self._bos, found.ids[at])
        following[:, SUB] = np.where(closes, 0, found.subs[at])
        following[:, ANSWER] = last[:, ANSWER] + closes
        following[:, POSITION] = np.where(closes, 0, last[:, POSITION] + 1)
        return following
