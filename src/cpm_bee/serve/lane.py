"""A search whose records have the same shape, and the shapes that there are."""

from __future__ import annotations

from typing import NamedTuple

from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.job import Job
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.model.network import CPMBee
from cpm_bee.serve.work import Item, Request
from cpm_bee.tokenizer import Tokenizer


class Shape(NamedTuple):
    """What searches that run together have in common."""

    num_beams: int
    is_sampling: bool
    max_length: int

    def options(self) -> GenerationOptions:
        if self.is_sampling:
            return GenerationOptions(
                temperature=1.0, num_return=self.num_beams, max_length=self.max_length
            )
        return GenerationOptions(beam_size=self.num_beams, max_length=self.max_length)


class Lane:
    """A search and the records in it."""

    def __init__(self, model: CPMBee, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._new_decoder = lambda: Decoder(model, tokenizer)
        self._decoder = self._new_decoder()
        self._max_tokens = max_tokens
        self.shape: Shape | None = None
        self.jobs: dict[Job, tuple[Request, Item]] = {}

    def begin(self, shape: Shape) -> None:
        """Take records of this shape from now on; the lane must be empty."""
        self.shape = shape
        self.search = BeamSearch(self._decoder, shape.options(), self._max_tokens)

    def reset(self) -> None:
        """Start anew after a failure, which may have left anything in memory."""
        self.shape = None
        self.jobs.clear()
        self._decoder = self._new_decoder()
