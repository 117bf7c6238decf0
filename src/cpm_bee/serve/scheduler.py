"""Answers requests in one thread, which shares the model's batches between them.

The HTTP side runs in an asyncio loop and never touches the model. It submits a prompt with the
options of its request and gets a `Ticket`, whose `updates` it awaits. The thread here
adds what was submitted to the running search, writes one token for all running records, and passes
each new token on to the loop of its ticket. Requests with other numbers of beams cannot share
a search, so there is one search for each; they take turns. A client that leaves sets
`Ticket.cancelled`, and its record is dropped before the next token.

Hazards: a ticket's queue belongs to the loop, so the thread only reaches it by
`call_soon_threadsafe`; an exception in the thread would leave clients waiting for ever, so it ends
all tickets with the error and `is_alive` turns false, which `/health` reports.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.job import Job
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5  # between looks at whether to stop


class QueueFull(Exception):
    """Too many requests wait."""


class Update(NamedTuple):
    """News of a request: the texts of its answers so far (None: not reached yet), or its end."""

    texts: list[str | None]
    num_tokens: int  # written so far
    ended: bool = False
    was_cut: bool = False  # at the limit of tokens
    error: str | None = None


@dataclass(eq=False)
class Ticket:
    """A submitted request."""

    prompt: Prompt
    options: GenerationOptions
    wants_updates: bool
    loop: asyncio.AbstractEventLoop
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    job: Job | None = None
    _queue: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)

    @property
    def kind(self) -> tuple[int, bool]:
        """What requests must have in common to share a search."""
        return self.options.num_beams, self.options.is_sampling

    def put(self, update: Update) -> None:
        """Pass an update on; called in the scheduler's thread."""
        try:
            self.loop.call_soon_threadsafe(self._queue.put_nowait, update)
        except RuntimeError:
            self.cancelled = True  # the loop has ended

    async def updates(self, timeout: float) -> AsyncGenerator[Update, None]:
        """Yields the updates, the last one with `ended`; iterate in the loop that submitted it.

        Raises:
            asyncio.TimeoutError: it did not end within `timeout` seconds from its submission.
        """
        try:
            while True:
                left = self.submitted + timeout - time.monotonic()
                update = await asyncio.wait_for(self._queue.get(), left)
                yield update
                if update.ended:
                    return
        finally:
            self.cancelled = True  # has no effect on a request that has ended


class Scheduler:
    """The thread that answers requests.

    Args:
        max_waiting: how many requests may wait for a slot.
        max_tokens: keys and values that the cache of a search may hold; see `BeamSearch`.
        max_length: the most tokens of an answer; no request may want more.
    """

    def __init__(
        self, generator: Generator, *, max_waiting: int, max_tokens: int, max_length: int
    ) -> None:
        self.generator = generator
        self._max_length = max_length
        self._max_waiting = max_waiting
        self._max_tokens = max_tokens
        self._submitted: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._searches: dict[tuple[int, bool], BeamSearch] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Finish the requests that were submitted, for at most `timeout` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._submitted) + sum(s.num_waiting for s in list(self._searches.values()))

    @property
    def num_running(self) -> int:
        return max(0, len(self._active) + len(self._submitted) - self.num_waiting)

    def submit(
        self, prompt: Prompt, options: GenerationOptions, *, wants_updates: bool = False
    ) -> Ticket:
        """Queue a prompt that has answers to write; call it in a running loop.

        Raises:
            QueueFull: too many requests wait already, or the server is stopping.
        """
        ticket = Ticket(prompt, options, wants_updates, asyncio.get_running_loop())
        with self._wake:
            if self._stopping or not self.is_alive or self.num_waiting >= self._max_waiting:
                raise QueueFull
            self._submitted.append(ticket)
            self._wake.notify()
        return ticket

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._take_submitted()
                self._drop_cancelled()
                for kind, search in list(self._searches.items()):
                    self._step(kind, search)
                    if search.is_idle and kind != self._latest:
                        del self._searches[kind]  # with its cache
        except Exception as error:  # all clients must hear of it
            logger.exception("the scheduler failed")
            for ticket in [*self._active, *self._submitted]:
                ticket.put(Update([], 0, ended=True, error=f"{type(error).__name__}: {error}"))

    def _wait(self) -> bool:
        """Wait for something to do; false if there is nothing left and the server is stopping."""
        with self._wake:
            while not (self._submitted or self._active):
                if self._stopping:
                    return False
                self._wake.wait(_IDLE_SECONDS)
        return True

    def _take_submitted(self) -> None:
        while self._submitted:
            ticket = self._submitted[0]
            search = self._searches.get(ticket.kind)
            if search is None:
                model, tokenizer = self.generator.model, self.generator.tokenizer
                longest = replace(ticket.options, max_length=self._max_length)
                search = BeamSearch(Decoder(model, tokenizer), longest, self._max_tokens)
                self._searches[ticket.kind] = search
            self._latest = ticket.kind
            ticket.job = search.add(ticket.prompt, ticket.options)
            self._active.append(ticket)
            self._submitted.popleft()

    def _drop_cancelled(self) -> None:
        for ticket in [t for t in self._active if t.cancelled]:
            self._active.remove(ticket)
            if ticket.job is not None and not ticket.job.has_ended:
                self._searches[ticket.kind].cancel(ticket.job)

    def _step(self, kind: tuple[int, bool], search: BeamSearch) -> None:
        if search.is_idle:
            return
        ended = set(map(id, search.step()))
        for ticket in list(self._active):
            job = ticket.job
            assert job is not None
            if id(job) in ended:
                self._active.remove(ticket)
                ticket.put(self._update(ticket, job, ended=True))
            elif ticket.wants_updates and ticket.kind == kind:
                ticket.put(self._update(ticket, job))

    def _update(self, ticket: Ticket, job: Job, *, ended: bool = False) -> Update:
        search = self._searches[ticket.kind]
        answers = job.answers() if ended else search.answers_so_far(job)
        texts: list[str | None] = [None] * len(ticket.prompt.answers)
        for i, pairs in enumerate(answers):
            texts[i] = ticket.prompt.text(pairs)
        written = sum(map(len, answers)) + len(answers)  # with `</s>`
        return Update(texts, written, ended, ended and job.was_cut)
