"""A record that is generated, and the hypotheses that its search has finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpm_bee.data.batch import Pair
from cpm_bee.generate.beams import ANSWER, ID, POSITION, SUB, Beams, Continuations
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.stop_sequences import NO_STOPS, StopSequences


class Hypothesis(NamedTuple):
    """A finished hypothesis.

    Attributes:
        score: mean log probability of the tokens.
        tokens: (n, 5), see `beams`; with the `<s>` of answers.
        is_whole: whether all answers ended; else it was cut off at the limit.
        is_stopped: whether the last answer ended with a stop sequence, which is in `tokens`, and
            not with `</s>`, which is not.
    """

    score: float
    tokens: np.ndarray
    is_whole: bool
    is_stopped: bool = False

    @property
    def num_written(self) -> int:
        """The number of tokens that the model wrote, the `</s>` of answers included."""
        # `<s>` of a later answer stands where `</s>` of the one before was written.
        return len(self.tokens) - 1 + (self.is_whole and not self.is_stopped)


class FinishedHypotheses:
    """The best `size` finished hypotheses, by the log probability of their tokens.

    Args:
        length_penalty: exponent of the number of tokens by which it is divided; 1 is their mean.
    """

    def __init__(self, size: int, length_penalty: float = 1.0) -> None:
        self._size = size
        self._length_penalty = length_penalty
        self.hypotheses: list[Hypothesis] = []  # best first

    def score(self, log_p: float, num_tokens: int) -> float:
        """The score of a hypothesis with this summed log probability."""
        return log_p / num_tokens**self._length_penalty

    def add(
        self, score: float, tokens: np.ndarray, is_whole: bool = True, is_stopped: bool = False
    ) -> None:
        self.hypotheses.append(Hypothesis(score, tokens, is_whole, is_stopped))
        # The sort is stable: among equal scores, the first found stays first.
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._size :]

    def cannot_improve(self, best_log_p: float, step: int) -> bool:
        """Whether `size` are found, and the worst scores at least what `best_log_p` would."""
        full = len(self.hypotheses) == self._size
        return full and self.hypotheses[-1].score >= self.score(best_log_p, step)


class Job:
    """A record that is generated.

    Attributes:
        options: its own; the number of hypotheses is that of the search.
        finished: its hypotheses so far.
        rng: draws its samples.
        most: the most tokens that are written, over all answers, the `</s>` of each included; None
            if `options.max_length` alone is the limit.
        stop: texts that end an answer (`stop_sequences`); the prompt has one answer then.
    """

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        number: int,
        most: int | None = None,
        stop: StopSequences = NO_STOPS,
    ) -> None:
        assert most is None or most > 0
        assert not stop.texts or len(prompt.answers) == 1
        self.prompt = prompt
        self.options = options
        self.most = most
        self.stop = stop
        self.finished = FinishedHypotheses(options.num_beams, options.length_penalty)
        self.rng = np.random.default_rng([options.seed, number])
        self.has_ended = False
        # The tokens that all hypotheses share, of which none can change any more, and their texts.
        self._num_shared = 0
        self._shared_texts: list[str] = []

    @property
    def last_step(self) -> int:
        """The index of the last token, after which every hypothesis is finished."""
        last_step = self.options.max_length + 1
        return last_step if self.most is None else min(last_step, self.most - 1)

    @property
    def best(self) -> list[Hypothesis]:
        """The hypotheses to return, best first."""
        return self.finished.hypotheses[: self.options.num_return]

    @property
    def was_cut(self) -> bool:
        """Whether the best hypothesis was cut off at the limit."""
        return not self.best[0].is_whole

    def answers(self) -> list[list[Pair]]:
        """The (id, sub) pairs of each answer of the best hypothesis, as `answers_of`."""
        return answers_of(self.best[0].tokens)

    def is_stopped_by(self, tokens: np.ndarray) -> bool:
        """Whether the newest of the tokens [n, 5] of a hypothesis completes a stop sequence."""
        # Each token is at least one character, and the `<s>` at the beginning is none.
        newest = tokens[1:][-self.stop.longest :, [ID, SUB]].tolist()
        text = self.prompt.text([(token_id, sub) for token_id, sub in newest])
        return self.stop.end_of(text) is not None

    def texts_so_far(self, beams: np.ndarray) -> list[str]:
        """The text of each answer that has begun, as far as it stays, whatever is written yet.

        The best hypothesis will be the best finished one or go on from a running one, so what all
        of these begin with stays. With one beam, that is each token as it is written.

        Args:
            beams: the tokens of the running hypotheses, [B, n, 5], none if the job has ended.
        """
        possible = [*beams, *(own.tokens for own in self.finished.hypotheses[:1])]
        part = slice(self._num_shared, min(map(len, possible)))
        columns = np.stack([tokens[part, [ID, SUB, ANSWER]] for tokens in possible])
        differs = (columns != columns[0]).any(axis=(0, 2))
        count = int(differs.argmax()) if differs.any() else len(differs)
        for token in possible[0][part][:count].tolist():
            if token[POSITION] == 0:  # `<s>`
                self._shared_texts.append("")
            else:
                self._shared_texts[-1] += self.prompt.text([(token[ID], token[SUB])])
        self._num_shared += count
        return list(self._shared_texts)


def stops_of(
    jobs: Sequence[Job], slots: np.ndarray, found: Continuations, beams: Beams
) -> np.ndarray:
    """Which continuations [R, k] of records complete a stop sequence."""
    stops = np.zeros(found.log_p.shape, dtype=bool)
    for row, job in enumerate(jobs):
        if job.stop.texts:
            for column in np.flatnonzero(found.log_p[row] > -np.inf).tolist():
                # With `</s>`, these are the tokens before it, which complete none.
                tokens = beams.hypothesis(slots[row], found, row, column)
                stops[row, column] = job.is_stopped_by(tokens)
    return stops


def answers_of(tokens: np.ndarray) -> list[list[Pair]]:
    """The (id, sub) pairs of each answer that has begun in tokens [n, 5], without `<s>`, `</s>`."""
    answers: list[list[Pair]] = [[] for _ in range(tokens[-1, ANSWER] + 1)]
    for token in tokens.tolist():
        if token[POSITION] > 0:  # position 0 is `<s>`
            answers[token[ANSWER]].append((token[ID], token[SUB]))
    return answers
