"""Records in, records with the model's answers out, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple, TypeAlias

from cpm_bee.encoding import Encoder
from cpm_bee.engine.device import free_memory
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.job import Hypothesis, Job, answers_of
from cpm_bee.generate.kv_cache import bytes_per_token
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.network import CPMBee
from cpm_bee.records import ANSWER, CANDIDATES, CUT, Record
from cpm_bee.tokenizer import Tokenizer

# The share of the free memory that keys and values may take if `max_tokens` is not given.
_MEMORY_SHARE = 0.25
# Records are read ahead and sorted by length, so many times as many as can run at once.
_READ_AHEAD = 4


class Output(NamedTuple):
    """A record that was read, and its job; None if it has no answers to write."""

    record: Record
    prompt: Prompt
    job: Job | None

    @property
    def was_cut(self) -> bool:
        """Whether the answer was cut off at the limit of tokens."""
        return self.job is not None and self.job.was_cut

    def filled(self) -> dict:
        """Returns a copy of the record with its best answer; None for a text that was not reached.

        It is marked by `CUT` if it was cut off. If several answers are wanted, all are listed under
        `CANDIDATES`, best first, each with the score it is ordered by.
        """
        if self.job is None:
            return dict(self.record)
        filled = [self._filled(hypothesis) for hypothesis in self.job.best]
        result = filled[0]
        if self.was_cut:
            result[CUT] = True
        if self.job.options.num_return > 1:
            result[CANDIDATES] = [
                {ANSWER: own[ANSWER], "score": hypothesis.score}
                for own, hypothesis in zip(filled, self.job.best, strict=True)
            ]
        return result

    def _filled(self, hypothesis: Hypothesis) -> dict:
        texts: list[str | None] = [None] * len(self.prompt.answers)
        for i, pairs in enumerate(answers_of(hypothesis.tokens)):
            texts[i] = self.prompt.text(pairs)
        return fill_answers(self.record, texts)


# Called with the record that is yielded next, and the texts that its best answers begin with: later
# calls for the same record only add to them (`growth` gives what is new).
OnTexts: TypeAlias = Callable[[Output, Sequence[str]], None]


def growth(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, str]]:
    """The text that each answer has gained between two calls of `OnTexts`, with its number."""
    old = [*before, *[""] * (len(after) - len(before))]
    pairs = list(zip(old, after, strict=True))
    assert all(new.startswith(own) for own, new in pairs)
    return [(i, new[len(own) :]) for i, (own, new) in enumerate(pairs) if new != own]


class Generator:
    """Writes the answers of records with a model, which it sets to eval mode.

    Args:
        examples: answered records that are in-context samples of each record (`Encoder`).
    """

    def __init__(
        self, model: CPMBee, tokenizer: Tokenizer, examples: Sequence[Record] = ()
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, examples)
        self._spare: Decoder | None = None  # its memory is used again by the next search

    def generate(self, record: Record, options: GenerationOptions) -> dict:
        """Returns a copy of a valid record with the model's answers; see `stream`."""
        return next(self.stream([record], options, max_tokens=1))  # room for one record

    def stream(
        self,
        records: Iterable[Record],
        options: GenerationOptions,
        max_tokens: int | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[dict]:
        """Yields a copy of each valid record, in order, with the model's answers.

        See `Output.filled`. The record's own answers are ignored. Args and errors as in `search`.
        """
        outputs = self.search(records, options, max_tokens, numbers)
        return (output.filled() for output in outputs)

    def search(
        self,
        records: Iterable[Record],
        options: GenerationOptions,
        max_tokens: int | None = None,
        numbers: Iterable[int] | None = None,
        on_texts: OnTexts | None = None,
    ) -> Iterator[Output]:
        """Yields each valid record, in order, with its ended job.

        The results do not depend on which records are generated together.

        Args:
            records: are read as they are needed.
            max_tokens: see `BeamSearch`; by default, what a quarter of the free memory holds.
            numbers: of the records, on which their samples depend; from 0 by default.
            on_texts: is called after each token, and once more before a record is yielded; see
                `OnTexts`.

        Raises:
            InputError: a special token of a record has a name that the vocabulary lacks.
            RunError: the model's logits are not finite.
        """
        self.model.eval()
        max_tokens = max_tokens or self.default_max_tokens()
        # Hazard: a caller may begin a search before another one has ended.
        decoder = self._spare or Decoder(self.model, self.tokenizer)
        self._spare = None
        try:
            numbered = zip(count() if numbers is None else numbers, records, strict=False)
            search = BeamSearch(decoder, options, max_tokens)
            yield from self._run(search, numbered, max_tokens, on_texts)
        finally:
            self._spare = decoder

    def _run(
        self,
        search: BeamSearch,
        records: Iterator[tuple[int, Record]],
        max_tokens: int,
        on_texts: OnTexts | None,
    ) -> Iterator[Output]:
        outputs: deque[Output] = deque()

        def show(output: Output) -> None:
            if on_texts is not None and output.job is not None:
                on_texts(output, search.texts_so_far(output.job))

        while True:
            if not search.num_waiting:
                outputs += self._read_ahead(search, records, max_tokens)
            while outputs and (outputs[0].job is None or outputs[0].job.has_ended):
                show(outputs[0])
                yield outputs.popleft()
            if not outputs:
                return
            search.step()
            show(outputs[0])

    def default_max_tokens(self) -> int:
        weight = self.model.input_embedding.weight
        memory = _MEMORY_SHARE * free_memory(weight.device)
        return int(memory) // max(bytes_per_token(self.model.config, weight.dtype), 1)

    def _read_ahead(
        self, search: BeamSearch, records: Iterator[tuple[int, Record]], max_tokens: int
    ) -> list[Output]:
        """Reads records and adds them to the search, longest first; returns them as read."""
        read: list[tuple[Record, Prompt]] = []
        numbers: list[int] = []
        num_tokens = 0
        for number, record in records:
            prompt = Prompt.of(record, self.encoder)
            read.append((record, prompt))
            numbers.append(number)
            num_tokens += search.num_tokens(prompt)
            full = num_tokens >= _READ_AHEAD * max_tokens
            if full or len(read) >= _READ_AHEAD * search.max_records:
                break
        jobs: dict[int, Job] = {}
        for i in sorted(range(len(read)), key=lambda i: -len(read[i][1].encoded)):
            if read[i][1].answers:
                jobs[i] = search.add(read[i][1], number=numbers[i])
        return [Output(*given, jobs.get(i)) for i, given in enumerate(read)]
