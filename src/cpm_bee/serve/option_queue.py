"""The records of requests whose answer is one of their options, chosen in batches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from cpm_bee.encoding import Encoder
from cpm_bee.errors import CpmBeeError
from cpm_bee.generate.choices import choose
from cpm_bee.model.network import CPMBee
from cpm_bee.serve.api_errors import ApiError, failed
from cpm_bee.serve.work import Item, Request

_LOGGER = logging.getLogger(__name__)
_TOKENS = 8192  # of prompts that are chosen for in one batch


class OptionQueue:
    """Belongs to the scheduler's thread.

    Args:
        fail: is called with requests that end with an error.
    """

    def __init__(
        self,
        model: CPMBee,
        encoder: Encoder,
        fail: Callable[[Iterable[Request], ApiError], None],
    ) -> None:
        self._model, self._encoder, self._fail = model, encoder, fail
        self._queue: deque[tuple[Request, Item]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def requests(self) -> set[Request]:
        return {request for request, _ in self._queue}

    def add(self, request: Request) -> None:
        self._queue.extend((request, item) for item in request.items)

    def drop(self, request: Request) -> None:
        self._queue = deque(pair for pair in self._queue if pair[0] is not request)

    def choose(self, on_start: Callable[[Request, Item], None]) -> dict[Request, float]:
        """Choose for a batch of the records that wait; the next call takes the next ones.

        Returns:
            The requests that it was for, with the time when it began (`time.monotonic`).
        """
        batch = self._next_batch()
        if not batch:
            return {}
        began = time.monotonic()
        for request, item in batch:
            on_start(request, item)
        choosing = batch[0][0].choosing
        assert choosing is not None
        try:
            choices = choose(
                self._model,
                self._encoder,
                [item.record for _, item in batch],
                max_tokens=_TOKENS,
                orders=choosing.orders,
                seed=choosing.seed,
                numbers=[item.number for _, item in batch],
                quiet=True,
            )
        except Exception as error:
            if not isinstance(error, CpmBeeError):
                _LOGGER.exception("choosing among options failed")
            failure = failed(f"choosing among options failed: {error}")
            self._fail({request for request, _ in batch}, failure)
            return {}
        for (_, item), choice in zip(batch, choices, strict=True):
            item.choice = choice
        return dict.fromkeys((request for request, _ in batch), began)

    def _next_batch(self) -> list[tuple[Request, Item]]:
        """Take the records in front that are chosen for in the same way."""
        batch: list[tuple[Request, Item]] = []
        num_tokens = 0
        while self._queue:
            request, item = self._queue[0]
            choosing = request.choosing
            assert choosing is not None
            num_tokens += len(item.prompt.encoded) * choosing.orders
            if batch and (choosing != batch[0][0].choosing or num_tokens > _TOKENS):
                break
            batch.append(self._queue.popleft())
        return batch
