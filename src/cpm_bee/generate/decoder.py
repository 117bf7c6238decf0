"""Runs the model on prompts and beams of any number of records, for the next token of each beam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from cpm_bee.data.batch import collate, extension_pairs
from cpm_bee.generate.beams import ANSWER, ID, POSITION, SUB, WRITER, Beams, Continuations
from cpm_bee.generate.candidates import GROUP
from cpm_bee.generate.kv_cache import SlotCache
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.cached_attention import BeamAttention, BeamBias, KeyValue, Window
from cpm_bee.model.network import CPMBee
from cpm_bee.tokenizer import Tokenizer

# Logits are computed for so many beams at once: with 86,583 tokens they take 0.33 MiB a beam.
_LOGITS_ROWS = 128
# On a CPU, so many records share a product of attention. Records start longest first, so that those
# in neighbouring slots are of similar length, and less is masked than in one product of all.
_WINDOW_SLOTS = 8


# From the logits [r * B, C] of a slice of records and the log p of their beams [r, B] to k
# continuations of each, [r, k]: their summed log p, parents, and numbers of candidates.
Choose = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, ...]]


class Shape(NamedTuple):
    """How the memory for keys and values is divided."""

    num_slots: int
    prompt_columns: int  # for a prompt and `<s>`
    answer_columns: int  # for each beam, one a step

    @property
    def columns(self) -> int:
        return self.prompt_columns + self.answer_columns


class _Slot(NamedTuple):
    """What the decoder keeps of a record."""

    prompt: Prompt
    relations: np.ndarray  # (answers, segments), of the record's answers to its segments
    pairs: np.ndarray  # (E, 2), its (id, sub > 0) pairs
    table: torch.Tensor  # (E, dim_model), their embeddings


class Decoder:
    """The model's side of generation: slots 0 to n - 1 hold records that are being generated.

    Candidates are numbered as in training: the vocabulary, then the record's (id, sub > 0) pairs.
    """

    def __init__(self, model: CPMBee, tokenizer: Tokenizer) -> None:
        self._model, self.tokenizer = model, tokenizer
        weight = model.input_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._cache = SlotCache(model.config, self._dtype, self._device)
        self._slots: list[_Slot] = []
        self._logits = torch.empty(0, 0)

    def divide(self, shape: Shape, beam_size: int) -> None:
        """Make room for other numbers of slots and columns; no record may be in a slot."""
        self.shape = shape
        self._cache.divide(shape.num_slots, shape.columns)
        beams = (shape.num_slots, beam_size, shape.columns)
        bias = self._model.position_bias
        self._bias = BeamBias(bias, beams, shape.prompt_columns, self._dtype)
        self._slots = [None] * shape.num_slots  # type: ignore[list-item]
        self._answers = np.full((shape.num_slots, beam_size), -1)  # that the bias is set for
        self._relations = np.zeros((shape.num_slots, beam_size, 1), dtype=np.uint8)

    def move(self, source: int, target: int, beams: Beams) -> None:
        """Move a record to another slot."""
        self._slots[target] = self._slots[source]
        self._answers[target] = self._answers[source]
        self._relations[target] = self._relations[source]
        self._bias.move(source, target)
        self._cache.move(source, target, self._columns(beams, range(source, source + 1)))

    def prefill(self, prompts: Sequence[Prompt], slots: Sequence[int]) -> torch.Tensor:
        """Put records into slots; returns the states that predict their first token, [R, dim]."""
        records = [prompt.started for prompt in prompts]
        for slot, prompt in zip(slots, prompts, strict=True):
            self._start(slot, prompt)
        batch = collate(records, self.tokenizer).to(self._device)
        lengths = np.array([len(record) for record in records])
        ends = lengths.cumsum()
        # The prompt ends at the last of its columns.
        column = np.arange(ends[-1]) + (self.shape.prompt_columns - ends).repeat(lengths)
        rows = self._rows(np.repeat(slots, lengths), column)
        return self._model.prefill(
            batch, lambda layer, new: self._cache.write(layer, rows, KeyValue(*new))
        )

    def _start(self, slot: int, prompt: Prompt) -> None:
        relations = prompt.encoded.tree.relations[list(prompt.answers)]
        pairs = np.array(extension_pairs([prompt.encoded]), dtype=np.int64).reshape(-1, 2)
        table = self._model.input_embedding(*self._to_device(pairs[:, 0], pairs[:, 1]))
        self._slots[slot] = _Slot(prompt, relations, pairs, table)
        self._answers[slot] = -1
        missing = len(prompt.answers) - self._relations.shape[2]
        if missing > 0:
            self._relations = np.pad(self._relations, ((0, 0), (0, 0), (0, missing)))

    def candidate(self, prompt: Prompt, token: str) -> int:
        """The number of a special token of a prompt among its candidates."""
        token_id, sub = pair = prompt.pair_of(token)
        if not sub:
            return token_id
        return len(self.tokenizer) + extension_pairs([prompt.encoded]).index(pair)

    def step(self, beams: Beams, num_slots: int) -> torch.Tensor:
        """Run each beam's newest token; returns the states that predict the next, [R * B, dim].

        Call it once for each token: it writes the token's keys and values.
        """
        newest, written = beams.newest(num_slots), beams.written(num_slots)
        answers = newest[:, :, ANSWER]
        for slot in np.flatnonzero((answers != self._answers[:num_slots]).any(axis=1)).tolist():
            self._set_answers(slot, answers[slot])
        relations = np.take_along_axis(
            self._relations[:num_slots], written[..., ANSWER].astype(np.int64), axis=2
        )
        distances = written[..., POSITION] - newest[:, :, None, POSITION]
        self._bias.set_answers(*self._to_device(relations, distances, written[..., WRITER]))
        # Each beam has a column of each step, one after the other.
        beam = np.arange(newest.shape[1])
        first = self.shape.prompt_columns + (beams.last[:num_slots] - 1) * len(beam)
        rows = self._rows(np.arange(num_slots).repeat(len(beam)), (first[:, None] + beam).flatten())
        size = _WINDOW_SLOTS if self._device.type == "cpu" else num_slots
        windows = [
            Window(part, self._columns(beams, range(part.start, part.stop)))
            for part in _slices(num_slots, size)
        ]
        attend = BeamAttention(self._cache, rows, self._bias, windows)
        ids, subs = self._to_device(newest[:, :, ID].flatten(), newest[:, :, SUB].flatten())
        return self._model.decode(ids, subs, attend)

    def _set_answers(self, slot: int, answers: np.ndarray) -> None:
        """Set the bias to the prompt for the answers that the beams of a slot are writing."""
        prompt, relations, *_ = self._slots[slot]
        own = relations[answers]  # (B, segments)
        [to_prompt] = self._to_device(own[:, prompt.encoded.segments])
        self._bias.set_prompt(slot, to_prompt)
        self._relations[slot, :, : len(prompt.answers)] = own[:, list(prompt.answers)]
        self._answers[slot] = answers

    def _columns(self, beams: Beams, slots: range) -> slice:
        """The columns that some of these slots use."""
        longest = max(len(self._slots[slot].prompt.encoded) for slot in slots) + 1
        begin = self.shape.prompt_columns
        beam_size = beams.log_p.shape[1]
        return slice(begin - longest, begin + int(beams.last[list(slots)].max()) * beam_size)

    def continuations(
        self,
        states: torch.Tensor,
        slots: np.ndarray,
        log_p: np.ndarray,
        k: int,
        choose: Choose,
    ) -> Continuations:
        """Continuations of each record, as `choose` finds them in the logits.

        Args:
            states: of R * B beams, from `prefill` (B is 1) or `step`.
            slots: of the R records.
            log_p: of their beams, [R, B].
            k: the least number of candidates, which is made up by such with the logit -inf.
        """
        width = log_p.shape[1]
        found = []
        for part in _slices(len(slots), max(_LOGITS_ROWS // width, 1)):
            rows = slice(part.start * width, part.stop * width)
            logits = self._next_logits(states[rows], slots[part], k)
            [before] = self._to_device(log_p[part], dtype=torch.float32)
            found.append(choose(logits, before, part))
        parts = (torch.cat(arrays).cpu().numpy() for arrays in zip(*found, strict=True))
        total, parents, numbers = parts
        return Continuations(total, parents, *self._pairs(slots, numbers))

    def _next_logits(self, states: torch.Tensor, slots: np.ndarray, k: int) -> torch.Tensor:
        """The logits fp32 [R * B, C] of candidates, and -inf for all else; a shared buffer."""
        vocab_size = len(self.tokenizer)
        records = [self._slots[slot] for slot in slots]
        tables = pad_sequence([record.table for record in records], batch_first=True)  # (R, E, dim)
        size = max(vocab_size + tables.shape[1], k)
        size += -size % GROUP
        if len(states) > len(self._logits) or size != self._logits.shape[1]:
            self._logits = states.new_empty(len(states), size)
        logits = self._logits[: len(states)]
        self._model.input_embedding.vocabulary_logits(states, logits[:, :vocab_size])
        logits[:, vocab_size:] = float("-inf")
        of_records = logits.unflatten(0, (len(slots), -1))  # (R, B, C)
        if tables.shape[1]:
            h = states.unflatten(0, (len(slots), -1))
            entries = torch.bmm(h, tables.mT.to(h.dtype))  # (R, B, E)
            counts = torch.tensor([len(record.table) for record in records])
            absent = torch.arange(tables.shape[1]) >= counts[:, None]  # (R, E)
            entries.masked_fill_(absent[:, None].to(h.device), float("-inf"))
            of_records[:, :, vocab_size : vocab_size + tables.shape[1]] = entries
        forbidden = [i for i, record in enumerate(records) if not record.prompt.has_unknown]
        of_records[forbidden, :, self.tokenizer.unk] = float("-inf")
        return logits.float()

    def _pairs(self, slots: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids and subs of candidates [R, k]."""
        extra = numbers - len(self.tokenizer)
        ids, subs = numbers.copy(), np.zeros_like(numbers)
        for row in np.flatnonzero((extra >= 0).any(axis=1)):
            pairs = self._slots[slots[row]].pairs
            # What is beyond a record's own pairs has the log probability -inf.
            own = (extra[row] >= 0) & (extra[row] < len(pairs))
            ids[row, own], subs[row, own] = pairs[extra[row, own]].T
        return ids, subs

    def _rows(self, slots: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        return self._cache.rows(*self._to_device(slots, columns))

    def _to_device(
        self, *arrays: np.ndarray, dtype: torch.dtype = torch.int64
    ) -> Iterator[torch.Tensor]:
        for array in arrays:
            yield torch.from_numpy(np.ascontiguousarray(array)).to(self._device, dtype)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
