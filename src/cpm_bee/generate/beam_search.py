"""Beam search for any number of records at once, as in the reference (docs/format.md §10).

`BeamSearch.add` queues a record, also while others are running; each `BeamSearch.step` writes one
token for each beam of all running records and returns the records that have ended. A record that
ends frees its slot, and the next step begins with the prompts of waiting records in all free slots.
Records only share products, so their answers do not depend on each other.

With a temperature, the beams of a record are independent samples instead (`generate/sampling.py`):
each is continued by one drawn token, and the record ends with the last of them. The rest, from here
to the cache, does not know how a continuation was chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from cpm_bee.generate.beams import ANSWER, Beams, Choice, Continuations
from cpm_bee.generate.candidates import best_continuations
from cpm_bee.generate.decoder import Decoder, Shape
from cpm_bee.generate.job import Job, stops_of
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.sampling import sample
from cpm_bee.generate.scoring import check_finite
from cpm_bee.generate.stop_sequences import NO_STOPS, StopSequences

# More beams at once gain no speed on a CPU: products are as fast with half as many.
_MAX_BEAMS = 256
# So many tokens of prompts are run at once.
_PREFILL_TOKENS = 4096


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
        self._num_beams = options.num_beams
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
        return max(_MAX_BEAMS // self._num_beams, 1)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not any(self._running)

    def num_tokens(self, prompt: Prompt) -> int:
        """How many keys and values a record needs, compare `max_tokens`."""
        return self.prompt_columns(prompt) + self._last_step * self._num_beams

    def add(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        number: int = 0,
        most: int | None = None,
        stop: StopSequences = NO_STOPS,
    ) -> Job:
        """Queue a prompt that has answers to write; it may be waited for in any order.

        Args:
            options: of this record; they may differ from those of the search in all but the number
                of hypotheses and whether they are samples, and in the length only downwards.
            number: of the record; samples depend on it and on the seed.
            most, stop: see `Job`.
        """
        job = Job(prompt, options or self._options, number, most, stop)
        assert job.options.num_beams == self._num_beams and job.last_step <= self._last_step
        assert job.options.is_sampling == self._options.is_sampling
        self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Drop a job that has not ended; its slot is free for the next step."""
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._running[self._running.index(job)] = None

    def is_running(self, job: Job) -> bool:
        """Whether a job has a slot."""
        return job in self._running

    def texts_so_far(self, job: Job) -> list[str]:
        """The text of each answer that has begun, as far as no later step changes it.

        That is the whole text once the job has ended; [] while it waits. A token is never a part of
        a character, so a text grows by whole characters.
        """
        if job in self._running:
            slot = self._running.index(job)
            exist = self._beams.log_p[slot] > -np.inf
            beams = self._beams.tokens[slot, exist, : self._beams.last[slot] + 1]
        elif job.has_ended:
            beams = np.empty((0, 0, 0), dtype=np.int32)
        else:
            return []
        return job.texts_so_far(beams)

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
        answer_columns = self._last_step * self._num_beams
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
        self._decoder.divide(self._shape, self._num_beams)
        self._beams = Beams(
            self._shape.num_slots,
            self._num_beams,
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
        """Make the next beams of records from the present ones' states.

        Args:
            states: see `Decoder.continuations`, as for the others.
        """
        jobs = [job for slot in slots if (job := self._running[slot]) is not None]
        k = self._num_beams if self._options.is_sampling else 2 * self._num_beams

        def choose(
            logits: torch.Tensor, before: torch.Tensor, part: slice
        ) -> tuple[torch.Tensor, ...]:
            self._penalize_repetition(logits, jobs[part], slots[part], before.shape[1])
            if self._options.is_sampling:
                return self._sampled(logits, before, jobs[part])
            return best_continuations(logits, before, k)

        found = self._decoder.continuations(states, slots, log_p, k, choose)
        check_finite(found.log_p[:, 0])
        num_answers = np.array([len(job.prompt.answers) for job in jobs])
        is_last = self._beams.last[slots] == [job.last_step for job in jobs]
        stops = stops_of(jobs, slots, found, self._beams)
        choice = self._beams.choose(slots, found, num_answers, is_last, stops)
        ended = [
            job
            for row, job in enumerate(jobs)
            if self._has_ended(job, slots[row], row, found, choice)
        ]
        going = np.array([job not in ended for job in jobs])
        for slot, job in zip(slots[~going], ended, strict=True):
            job.has_ended = True
            self._running[slot] = None
        if going.any():
            parts = (array[going] for array in found), (array[going] for array in choice)
            self._beams.advance(slots[going], Continuations(*parts[0]), Choice(*parts[1]))
        return ended

    def _penalize_repetition(
        self, logits: torch.Tensor, jobs: Sequence[Job], slots: np.ndarray, width: int
    ) -> None:
        """Penalize the tokens that the beams of these records have written, in place."""
        of_records = logits.unflatten(0, (len(jobs), width))
        for row, job in enumerate(jobs):
            if job.options.repetition_penalty != 1:
                window = job.options.repetition_window
                recent = self._beams.recent_ids(slots[row : row + 1], window)[0, :width]
                ids = torch.from_numpy(recent.astype(np.int64)).to(logits.device)
                penalize_repetition_(of_records[row], ids, job.options.repetition_penalty)

    def _sampled(
        self, logits: torch.Tensor, before: torch.Tensor, jobs: Sequence[Job]
    ) -> tuple[torch.Tensor, ...]:
        """One continuation of each sample; at the first token, all samples of the first beam."""
        num_records, width = before.shape
        draws = self._num_beams // width  # from each row
        uniforms = np.stack([job.rng.random(self._num_beams) for job in jobs])
        options = [job.options for job in jobs for _ in range(width)]
        log_p, numbers = sample(logits, options, uniforms.reshape(-1, draws))
        total = log_p.unflatten(0, (num_records, width)) + before[:, :, None]
        parents = torch.arange(width, device=logits.device).repeat_interleave(draws)
        shape = (num_records, self._num_beams)
        return total.flatten(1), parents.expand(shape), numbers.reshape(shape)

    def _has_ended(
        self, job: Job, slot: int, row: int, found: Continuations, choice: Choice
    ) -> bool:
        """Adds the hypotheses that a record has finished in this step; whether the search ends."""
        step = int(self._beams.last[slot])
        is_sampling = self._options.is_sampling
        if not is_sampling and job.finished.cannot_improve(float(found.log_p[row, 0]), step):
            return True
        for column in np.flatnonzero(choice.finished[row]).tolist():
            # Each token so far, `<s>` included, has predicted the next one.
            score = job.finished.score(float(found.log_p[row, column]), step + 1)
            tokens = self._beams.hypothesis(slot, found, row, column)
            reached = tokens[-1, ANSWER] + 1 == len(job.prompt.answers)
            is_stopped = bool(choice.stops[row, column])
            is_whole = is_stopped or bool(reached and choice.closes[row, column])
            job.finished.add(score, tokens, is_whole, is_stopped)
        return not choice.taken[row].any()
