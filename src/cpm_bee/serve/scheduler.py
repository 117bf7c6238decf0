"""One thread that owns the model and answers the records of all requests, as many as fit at once.

Records whose searches have the same shape (number of beams or samples, length) share a
`BeamSearch`, a lane; each turn writes one token in every lane that has records. Records enter lanes
in the order in which they came. If no lane has the shape of the first one that waits, it and all
behind it wait until a lane is empty, so no shape is starved by others. Lanes only share the thread:
what is answered does not depend on who else is here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable

from cpm_bee.encoding import Encoder
from cpm_bee.errors import CpmBeeError
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.generator import Output
from cpm_bee.model.network import CPMBee
from cpm_bee.serve.api_errors import ApiError, failed, queue_full, shutting_down
from cpm_bee.serve.heap import HeapTrimmer, malloc_trim
from cpm_bee.serve.lane import Lane, Shape
from cpm_bee.serve.metrics import Metrics
from cpm_bee.serve.option_queue import OptionQueue
from cpm_bee.serve.options import ServeOptions
from cpm_bee.serve.work import Item, Request
from cpm_bee.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)
_LANES = 4  # different shapes at once; the memory for keys and values is divided among them


class Scheduler:
    """The queue of records and the thread that answers them.

    Args:
        max_tokens: how many keys and values are held at once, see `BeamSearch`.
    """

    def __init__(
        self,
        model: CPMBee,
        tokenizer: Tokenizer,
        options: ServeOptions,
        max_tokens: int,
        metrics: Metrics,
    ) -> None:
        self._model, self._tokenizer, self._options = model.eval(), tokenizer, options
        self._metrics = metrics
        self.max_tokens = max_tokens // _LANES  # of a record, at the most
        self._lanes = [Lane(model, tokenizer, self.max_tokens) for _ in range(_LANES)]
        self._changed = threading.Condition()
        # Under the condition: what other threads ask for.
        self._arrived: list[Request] = []
        self._cancelled: list[Request] = []
        self._num_waiting = 0  # records that have no slot yet
        self._stopping: ApiError | None = None
        # The thread's own.
        self._queue: deque[tuple[Request, Item]] = deque()
        # Its encoder is not that of the thread that reads requests.
        self._options_queue = OptionQueue(self._model, Encoder(tokenizer), self._fail)
        self._heap = HeapTrimmer(malloc_trim())
        self._recent = deque([0.0], maxlen=32)  # seconds that records took in their slots
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # ------------------------------------------------------------------ for other threads

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ApiError: too many records wait, or the server ends.
        """
        with self._changed:
            if self._stopping is not None:
                raise self._stopping
            if self._num_waiting + len(request.items) > self._options.max_waiting:
                raise queue_full(self._seconds_to_wait())
            self._num_waiting += len(request.items)
            self._arrived.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Drop the records of a request that are not done; its slots are free for the next step."""
        with self._changed:
            if not request.is_done:
                self._cancelled.append(request)
                self._changed.notify()

    def stop(self) -> None:
        """End the thread; what is not done fails with status 503."""
        with self._changed:
            self._stopping = shutting_down()
            self._changed.notify()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _seconds_to_wait(self) -> int:
        """About how long until some of the waiting records have a slot."""
        return max(1, min(60, round(sum(self._recent) / len(self._recent))))

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            self._wait()
            with self._changed:
                arrived, self._arrived = self._arrived, []
                cancelled, self._cancelled = self._cancelled, []
                stopping = self._stopping
            for request in arrived:
                self._take(request)
            for request in cancelled:
                self._drop(request)
            if stopping is not None:
                everyone = {r for r, _ in self._queue} | self._options_queue.requests
                everyone |= {r for lane in self._lanes for r, _ in lane.jobs.values()}
                self._fail(everyone, stopping)
                return
            self._choose_options()
            self._fill_lanes()
            for lane in self._lanes:
                if lane.jobs:
                    self._step(lane)
            self._update_gauges()
            self._heap.has_worked()

    def _wait(self) -> None:
        """Wait for something to do."""

        def is_needed() -> bool:
            return self._has_work or self._stopping is not None

        with self._changed:
            if self._changed.wait_for(is_needed, self._heap.seconds_to_wait):
                return
        self._heap.is_idle()  # without the lock, which others would wait for
        with self._changed:
            self._changed.wait_for(is_needed)

    @property
    def _has_work(self) -> bool:
        is_busy = self._queue or self._options_queue or any(lane.jobs for lane in self._lanes)
        return bool(is_busy or self._arrived or self._cancelled)

    def _take(self, request: Request) -> None:
        if request.choosing is None:
            self._queue.extend((request, item) for item in request.items)
        else:
            self._options_queue.add(request)

    def _started(self, request: Request, item: Item) -> None:
        """Note that a record does not wait any more."""
        if not item.has_started:
            item.has_started = True
            with self._changed:
                self._num_waiting -= 1

    def _drop(self, request: Request) -> None:
        """Take a request out of everything."""
        if request.is_cancelled or request.is_done:
            return
        request.is_cancelled = True
        self._queue = deque(pair for pair in self._queue if pair[0] is not request)
        self._options_queue.drop(request)
        for lane in self._lanes:
            for job in [job for job, (own, _) in lane.jobs.items() if own is request]:
                del lane.jobs[job]
                lane.search.cancel(job)
        for item in request.items:
            self._started(request, item)
        self._metrics.ended(request, "abort")

    def _fail(self, requests: Iterable[Request], error: ApiError) -> None:
        for request in requests:
            if not request.is_done:
                self._drop(request)
                request.error = error
                request.notify()

    def _finish(self, request: Request) -> None:
        if request.is_done:
            request.ended = time.monotonic()
            self._metrics.ended(request)
            request.notify()

    # ------------------------------------------------------------------ generation

    def _shape_of(self, request: Request) -> Shape:
        options = request.options
        is_long = options.max_length > self._options.max_length
        length = self._options.max_answer_tokens if is_long else self._options.max_length
        return Shape(options.num_beams, options.is_sampling, length)

    def num_tokens(self, request: Request, item: Item) -> int:
        """How many keys and values a record needs, compare `max_tokens`."""
        length = self._shape_of(request).max_length + 1
        return BeamSearch.prompt_columns(item.prompt) + length * request.options.num_beams

    def _fill_lanes(self) -> None:
        while self._queue:
            request, item = self._queue[0]
            if not item.prompt.answers:
                self._queue.popleft()
                self._started(request, item)
                item.output = Output(item.record, item.prompt, None)
                self._finish(request)
                continue
            shape = self._shape_of(request)
            lane = next((lane for lane in self._lanes if lane.shape == shape), None)
            if lane is None:
                lane = next((lane for lane in self._lanes if not lane.jobs), None)
                if lane is None:
                    return
                lane.begin(shape)
            self._queue.popleft()
            limits = request.most, request.stop
            job = lane.search.add(item.prompt, request.options, item.number, *limits)
            lane.jobs[job] = request, item

    def _step(self, lane: Lane) -> None:
        """Write a token for each record that has a slot in a lane."""
        began = time.monotonic()
        try:
            lane.search.step()
        except Exception as error:
            # Whatever it is, the other lanes and later requests are not concerned.
            if not isinstance(error, CpmBeeError):
                _LOGGER.exception("a step of generation failed")
            affected = {request for request, _ in lane.jobs.values()}
            for job in list(lane.jobs):
                del lane.jobs[job]
            lane.reset()
            self._fail(affected, failed(f"generation failed: {error}"))
            return
        touched: set[Request] = set()
        for job, (request, item) in list(lane.jobs.items()):
            if not item.has_started and (job.has_ended or lane.search.is_running(job)):
                self._started(request, item)
                self._metrics.started(request, began)
            if request.follow and item.has_started:
                texts = lane.search.texts_so_far(job)
                if texts != item.texts:
                    item.texts = texts
                    touched.add(request)
            if job.has_ended:
                del lane.jobs[job]
                item.output = Output(item.record, item.prompt, job)
                self._recent.append(time.monotonic() - request.arrived)
                touched.add(request)
        for request in touched:
            if request.is_done:
                self._finish(request)
            else:
                request.notify()

    # ------------------------------------------------------------------ options

    def _choose_options(self) -> None:
        for request, began in self._options_queue.choose(self._started).items():
            self._metrics.started(request, began)
            self._finish(request)

    def _update_gauges(self) -> None:
        jobs = [
            (lane.search.num_tokens(job.prompt))
            for lane in self._lanes
            for job, (_, item) in lane.jobs.items()
            if item.has_started
        ]
        with self._changed:
            waiting = self._num_waiting
        self._metrics.state(len(jobs), waiting, sum(jobs) / (self.max_tokens * _LANES))
