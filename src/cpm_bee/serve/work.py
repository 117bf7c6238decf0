"""A request on its way through the scheduler, seen by its thread and by the one that answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpm_bee.generate.choices import Choice
from cpm_bee.generate.generator import Output
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.generate.stop_sequences import NO_STOPS, StopSequences
from cpm_bee.records import Record
from cpm_bee.serve.api_errors import ApiError


class Choosing(NamedTuple):
    """That an option of each record is chosen, instead of text being written."""

    orders: int  # see `choices.choose`
    seed: int


@dataclass(eq=False)
class Item:
    """A record of a request. The scheduler's thread writes, others read.

    Attributes:
        number: of the record in its request; samples depend on it.
        texts: of its answers, as far as they will not change; replaced, never altered.
        output: once it is generated.
        choice: once an option is chosen.
    """

    record: Record
    prompt: Prompt
    number: int
    texts: Sequence[str] = ()
    has_started: bool = False
    output: Output | None = None
    choice: Choice | None = None

    @property
    def is_done(self) -> bool:
        return self.output is not None or self.choice is not None


@dataclass(eq=False)
class Request:
    """The records that a client wants to be answered together.

    Attributes:
        most, stop: see `Job`.
        choosing: None if text is to be written.
        follow: whether `notify` is called for each growth of a text, not only at the end.
        notify: is called by the scheduler's thread.
        error: why there will be no answer; set before the last call of `notify`.
        arrived, first_token, ended: seconds of `time.monotonic`.
    """

    items: Sequence[Item]
    options: GenerationOptions
    most: int | None = None
    stop: StopSequences = NO_STOPS
    choosing: Choosing | None = None
    follow: bool = False
    notify: Callable[[], None] = lambda: None
    error: ApiError | None = None
    is_cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    ended: float | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or all(item.is_done for item in self.items)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(item.prompt.encoded) for item in self.items)

    @property
    def generated_tokens(self) -> int:
        """The tokens of all hypotheses that are returned, the `</s>` of answers included."""
        hypotheses = (
            hypothesis
            for item in self.items
            if item.output is not None and item.output.job is not None
            for hypothesis in item.output.job.best
        )
        return sum(own.num_written for own in hypotheses)
