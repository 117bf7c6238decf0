"""Beam search for any number of records at once, as in the reference (docs/format.md §10).

`BeamSearch.add` queues a record, also while others are running; each `BeamSearch.step` writes one
token for each beam of all running records and returns the records that have ended. A record that
ends frees its slot, and the next step begins with the prompts of waiting records in all free slots.
Records only share products, so their answers do not depend on each other.

What another way to write an answer (sampling) would change: which continuations `Decoder.best`
returns, and `FinishedHypotheses`. The rest, from here to the cache, does not know how a
continuation was chosen.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from cpm_bee.data.batch import Pair
from cpm_bee.errors import RunError
from cpm_bee.generate.beams import ANSWER, ID, POSITION, SUB, Beams, Choice, Continuations
from cpm_bee.generate.decoder import Decoder, Shape
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt

# More beams at once gain no speed on a CPU: products are as fast with half as many.
_MAX_BEAMS = 256
# So many tokens of prompts are run at once.
_PREFILL_TOKENS = 4096


class Hypothesis(NamedTuple):
    """A finished hypothesis: mean log probability, and tokens (see `beams`) with their `<s>`."""

    score: float
    tokens: np.ndarray  # (n, 5)


class FinishedHypotheses:
    """The best `size` finished hypotheses, by mean log probability of their tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.hypotheses: list[Hypothesis] = []  # best first

    def add(self, score: float, tokens: np.ndarray) -> None:
        self.hypotheses.append(Hypothesis(score, tokens))
        # The sort is stable: among equal scores, the first found stays first.
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._size :]

    def cannot_improve(self, best_log_p: float, step: int) -> bool:
        """Whether `size` are found, and the worst scores at least `best_log_p / step`."""
        full = len(self.hypotheses) == self._size
        return full and self.hypotheses[-1].score >= best_log_p / step


class Job:
    """A record that is generated; `finished` has its hypotheses so far."""

    def __init__(self, prompt: Prompt, beam_size: int) -> None:
        self.prompt = prompt
        self.finished = FinishedHypotheses(beam_size)
        self.has_ended = False

    def answers(self) -> list[list[Pair]]:
        """The (id, sub) pairs of each answer reached, without `<s>` and `</s>`."""
        tokens = self.finished.hypotheses[0].tokens
        answers: list[list[Pair]] = [[] for _ in range(tokens[-1, ANSWER] + 1)]
        for token in tokens.tolist():
            if token[POSITION] > 0:  # position 0 is `<s>`
                answers[token[ANSWER]].append((token[ID], token[SUB]))
        return answers


def penalize_repetition_(logits: torch.Tensor, ids: torch.Tensor, penalty: float) -> None:
    """Penalize each id of a beam, once, in place.

    Args:
        logits: [B, candidates].
        ids: vocabulary ids, [B, A]; an entry of the extension table counts as the id it shares.
    """
    found = logits.gather(1, ids)
    # Scattering the same value twice is harmless: each id is penalized once.
    logits.scatter_(1, ids, torch.where(found < 0, found * penalty, found / penalty))


class BeamSearch:
    """The records that are being generated and those that wait.

    Args:
        decoder: is used by no other search meanwhile; a later one uses its memory again.
        max_tokens: how many keys and values the cache may hold: for each record the prompt and, for
            each beam, the longest answer. One record is always run.
    """

    def __init__(self, decoder: Decoder, options: GenerationOptions, max_tokens: int) -> None:
        self._decoder, self._options, self._max_tokens = decoder, options, max_tokens
        self._last_step = options.max_length + 1
        self._waiting: deque[Job] = deque()
        self._running: list[Job | None] = []  # by slot; None is a free slot among them
        self._shape = Shape(0, 0, 0)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def max_records(self) -> int:
        """How many records may run at once, where `max_tokens` allows it."""
        return max(_MAX_BEAMS // self._options.beam_size, 1)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not any(self._running)

    def num_tokens(self, prompt: Prompt) -> int:
        """How many keys and values a record needs, compare `max_tokens`."""
        return self.prompt_columns(prompt) + self._last_step * self._options.beam_size

    def add(self, prompt: Prompt) -> Job:
        """Queue a prompt that has answers to write; it may be waited for in any order."""
        job = Job(prompt, self._options.beam_size)
        self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Drop a job that has not ended."""
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._running[self._running.index(job)] = None

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Start waiting records in free slots, and write a token; returns the jobs that ended."""
        ended = self._start_waiting()
        self._fill_gaps()
        slots = np.arange(len(self._running))
        if len(slots):
            states = self._decoder.step(self._beams, len(slots))
            ended += self._continue(states, slots, self._beams.log_p[slots])
        return ended

    # ------------------------------------------------------------------ slots

    def _start_waiting(self) -> list[Job]:
        """Run the prompts of waiting records, as many as there are free slots, for one token."""
        if not any(self._running):
            self._running.clear()
            if self._waiting:
                self._divide()
        ended: list[Job] = []
        while starting := self._next_slots():
            slots = np.array(list(starting))
            for slot, job in starting.items():
                self._running[slot] = job
                self._beams.start(slot)
            prompts = [job.prompt for job in starting.values()]
            states = self._decoder.prefill(prompts, list(starting))
            ended += self._continue(states, slots, np.zeros((len(slots), 1), dtype=np.float32))
        return ended

    def _next_slots(self) -> dict[int, Job]:
        """Takes waiting records whose prompts are run next, by slot."""
        starting: dict[int, Job] = {}
        num_tokens = 0
        gaps = [slot for slot, job in enumerate(self._running) if job is None]
        while self._waiting and self._fits(job := self._waiting[0]):
            num_tokens += self.prompt_columns(job.prompt)
            if starting and num_tokens > _PREFILL_TOKENS:
                break
            if not gaps:
                if len(self._running) == self._shape.num_slots:
                    break
                gaps.append(len(self._running))
                self._running.append(None)
            starting[gaps.pop(0)] = self._waiting.popleft()
        return starting

    def _fits(self, job: Job) -> bool:
        """Whether a slot is long enough for a job, and not so long that half as many would do."""
        prompt_columns = self.prompt_columns(job.prompt)
        shape = self._shape_for(prompt_columns)
        fits = prompt_columns <= self._shape.prompt_columns
        return fits and shape.num_slots < 2 * self._shape.num_slots

    @staticmethod
    def prompt_columns(prompt: Prompt) -> int:
        return len(prompt.encoded) + 1  # and `<s>`

    def _shape_for(self, prompt_columns: int) -> Shape:
        beam_size = self._options.beam_size
        answer_columns = self._last_step * beam_size
        num_slots = self._max_tokens // (prompt_columns + answer_columns)
        num_slots = max(min(num_slots, self.max_records), 1)
        # What is left makes slots longer, so that later records fit as well.
        left = self._max_tokens // num_slots - answer_columns
        return Shape(num_slots, max(prompt_columns, min(left, 2 * prompt_columns)), answer_columns)

    def _divide(self) -> None:
        """Divide the memory for the records that wait longest; none is running."""
        if self._fits(self._waiting[0]):
            return
        shape = self._shape_for(self.prompt_columns(self._waiting[0].prompt))
        first = list(self._waiting)[: shape.num_slots]
        longest = self._shape_for(max(self.prompt_columns(job.prompt) for job in first))
        # Hazard: the first one must fit, or nothing would ever start.
        self._shape = longest if shape.num_slots < 2 * longest.num_slots else shape
        self._decoder.divide(self._shape, self._options.beam_size)
        self._beams = Beams(
            self._shape.num_slots,
            self._options.beam_size,
            self._last_step + 1,
            self._decoder.tokenizer.bos,
            self._decoder.tokenizer.eos,
        )

    def _fill_gaps(self) -> None:
        """Move the last records into slots that stayed free: slots 0 to n - 1 are in use then."""
        for slot in [i for i, job in enumerate(self._running) if job is None]:
            while self._running and self._running[-1] is None:
                self._running.pop()
            if slot >= len(self._running):
                break
            last = len(self._running) - 1
            self._decoder.move(last, slot, self._beams)
            self._beams.move(last, slot)
            self._running[slot] = self._running.pop()

    # ------------------------------------------------------------------ the search

    def _continue(self, states: torch.Tensor, slots: np.ndarray, log_p: np.ndarray) -> list[Job]:
        """Make the next beams of records from the present ones' states; see `Decoder.best`."""

        def penalize(logits: torch.Tensor, part: slice) -> None:
            if self._options.repetition_penalty != 1:
                recent = self._beams.recent_ids(slots[part], self._options.repetition_window)
                ids = torch.from_numpy(recent[:, : log_p.shape[1]].astype(np.int64))
                ids = ids.flatten(0, 1).to(logits.device)
                penalize_repetition_(logits, ids, self._options.repetition_penalty)

        k = 2 * self._options.beam_size
        found = self._decoder.best(states, slots, log_p, k, penalize)
        if not (np.isfinite(found.log_p[:, 0])).all():
            raise RunError(
                "the model's logits are not finite: the weights are broken, or the range of "
                "--dtype is too small for them (--dtype fp32 has the largest)"
            )
        jobs = [self._running[slot] for slot in slots]
        num_answers = np.array([len(job.prompt.answers) for job in jobs if job])
        is_last = self._beams.last[slots] == self._last_step
        choice = self._beams.choose(slots, found, num_answers, is_last)
        ended = [
            job
            for row, job in enumerate(jobs)
            if job and self._has_ended(job, slots[row], row, found, choice)
        ]
        going = np.array([job not in ended for job in jobs])
        for slot, job in zip(slots[~going], ended, strict=True):
            job.has_ended = True
            self._running[slot] = None
        if going.any():
            parts = (array[going] for array in found), (array[going] for array in choice)
            self._beams.advance(slots[going], Continuations(*parts[0]), Choice(*parts[1]))
        return ended

    def _has_ended(
        self, job: Job, slot: int, row: int, found: Continuations, choice: Choice
    ) -> bool:
        """Adds the hypotheses that a record has finished in this step; whether the search ends."""
        step = int(self._beams.last[slot])
        if job.finished.cannot_improve(float(found.log_p[row, 0]), step):
            return True
        for column in np.flatnonzero(choice.finished[row]).tolist():
            # Each token so far, `<s>` included, has predicted the next one.
            score = float(found.log_p[row, column]) / (step + 1)
            job.finished.add(score, self._beams.hypothesis(slot, found, row, column))
        return not choice.taken[row].any()
