"""Golden results of generation, and a beam search without any cache to compare with."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from cpm_bee.data.batch import collate, extension_pairs
from cpm_bee.encoding import EncodedRecord, Encoder
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt, fill_answers
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.records import CANDIDATES, CUT, Record, without_marks
from cpm_bee.segments import outline
from cpm_bee.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden"

needs_shared = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"GOLDEN RESULTS NOT COMPARED: there is no {GOLDEN}"
)


# Golden results


def unmarked(result: Record) -> Record:
    """A result as the reference has it, which does not tell whether an answer was cut off."""
    plain: Record = without_marks(result)
    return plain


def golden_lines(name: str) -> list[dict[str, Any]]:
    with open(GOLDEN / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def model_by_recipe(config: ModelConfig, seed: int) -> CPMBee:
    """Weights as the recipe of the golden files makes them."""
    model = CPMBee(config)
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        w = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), dtype=np.float32))
        parameter.data = 1 + 0.1 * w if "layernorm" in name else w
    return model


def trained_model() -> CPMBee:
    model = CPMBee(ModelConfig.load(GOLDEN / "trained_config.json"))
    model.load_state_dict(torch.load(GOLDEN / "trained.bin", weights_only=True))
    return model.float()


# A search without any cache: every step runs the training path on the whole sequence.


@dataclass(frozen=True)
class Slow:
    log_p: float
    answers: tuple  # for each answer begun, its (id, sub) pairs after <s>


class SlowSearch:
    def __init__(
        self,
        model: CPMBee,
        tokenizer: Tokenizer,
        record: Record,
        options: GenerationOptions,
        examples: Sequence[Record] = (),
    ) -> None:
        self.model, self.tokenizer, self.record, self.options = model, tokenizer, record, options
        self.encoder = Encoder(tokenizer, examples)
        encoded, _ = self.encoder.encode_outline(outline(record), answers=False)
        self.prompt = encoded
        self.leaves = [i for i, predicted in enumerate(encoded.tree.predicted) if predicted]
        self.pairs = extension_pairs([encoded])
        self.may_unk = Prompt.of(record, self.encoder).has_unknown

    def log_probabilities(self, slow: Slow) -> list[float]:
        written: list[tuple[int, int]] = []
        places: list[int] = []
        for leaf, answer in zip(self.leaves, slow.answers, strict=False):
            written += [(self.tokenizer.bos, 0), *answer]
            places += [leaf] * (len(answer) + 1)
        ids, subs = np.array(written).T
        whole = EncodedRecord(
            ids=np.concatenate([self.prompt.ids, ids.astype(np.int32)]),
            subs=np.concatenate([self.prompt.subs, subs.astype(np.uint16)]),
            segments=np.concatenate([self.prompt.segments, np.array(places, dtype=np.uint16)]),
            tree=self.prompt.tree,
        )
        with torch.no_grad():
            batch = collate([whole], self.tokenizer, self.pairs)
            logits = self.model.eval()(batch)[-1].tolist()
        if not self.may_unk:
            logits[self.tokenizer.unk] = -math.inf
        window = self.options.repetition_window or len(ids)
        for i in set(ids.tolist()[-window:]):
            penalty = self.options.repetition_penalty
            logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
        log_p: list[float] = torch.tensor(logits, dtype=torch.float64).log_softmax(dim=0).tolist()
        return log_p

    def continued(self, slow: Slow, number: int, log_p: float) -> tuple[Slow, bool]:
        """(the continuation, whether it is complete)"""
        *before, answer = slow.answers
        if number == self.tokenizer.eos:
            complete = len(slow.answers) == len(self.leaves)
            return Slow(log_p, slow.answers if complete else (*slow.answers, ())), complete
        size = len(self.tokenizer)
        pair = (number, 0) if number < size else self.pairs[number - size]
        return Slow(log_p, (*before, (*answer, pair))), False

    def run(self) -> dict[str, Any]:
        beam_size, penalty = self.options.num_beams, self.options.length_penalty
        running = [Slow(0.0, ((),))]
        finished: list[tuple[float, tuple, bool]] = []
        last_step = self.options.max_length + 1
        for step in range(last_step + 1):
            candidates = [
                (slow.log_p + log_p, slow, number)
                for slow in running
                for number, log_p in enumerate(self.log_probabilities(slow))
                if log_p > -math.inf
            ]
            candidates.sort(key=lambda c: -c[0])
            candidates = candidates[: 2 * beam_size]
            full = len(finished) >= beam_size
            if full and sorted(finished, key=lambda f: -f[0])[beam_size - 1][0] >= (
                candidates[0][0] / step**penalty
            ):
                break
            running = []
            for log_p, slow, number in candidates:
                continuation, complete = self.continued(slow, number, log_p)
                if step == last_step and number == self.tokenizer.eos:
                    continuation = replace(slow, log_p=log_p)
                if complete or step == last_step:
                    score = log_p / (step + 1) ** penalty
                    finished.append((score, continuation.answers, complete))
                elif len(running) < beam_size:
                    running.append(continuation)
                if step < last_step and len(running) == beam_size:
                    break
        best = sorted(finished, key=lambda f: -f[0])[: self.options.num_return]
        result, *_ = filled = [self.filled(answers) for _, answers, _ in best]
        if not best[0][2]:
            result[CUT] = True
        if self.options.num_return > 1:
            scores = [pytest.approx(score, rel=1e-5) for score, *_ in best]
            result[CANDIDATES] = [
                {"<ans>": own["<ans>"], "score": score}
                for own, score in zip(filled, scores, strict=True)
            ]
        return result

    def filled(self, answers: tuple) -> dict[str, Any]:
        prompt = Prompt.of(self.record, self.encoder)
        texts: list[str | None] = [prompt.text(a) for a in answers]
        return fill_answers(self.record, texts + [None] * (len(self.leaves) - len(texts)))


texts = st.lists(
    st.sampled_from(["甲", "乙", "ab", "𠮷", "野x", "<option_0>", "<option_1>", "<mask_0>", "<<"]),
    max_size=5,
).map("".join)
answers = st.recursive(
    st.just(""),
    lambda inner: st.dictionaries(st.sampled_from("xy") | texts, inner, min_size=1, max_size=3),
    max_leaves=3,
)
records_of_any_kind = st.fixed_dictionaries(
    {"input": texts, "<ans>": answers}, optional={"options": st.dictionaries(texts, texts)}
)
options_of_any_kind = st.builds(
    lambda beam_size, num_return, **options: GenerationOptions(
        beam_size=beam_size, num_return=min(num_return, beam_size), **options
    ),
    beam_size=st.integers(1, 4),
    num_return=st.integers(1, 4),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0]),
    max_length=st.integers(1, 6),
    repetition_penalty=st.sampled_from([1.0, 1.3, 5.0]),
    repetition_window=st.sampled_from([None, 1, 3]),
)
