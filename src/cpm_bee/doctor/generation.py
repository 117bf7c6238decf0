"""Step `generation` of `doctor.py --gpu`: the logits of decoding in each dtype, and the answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch

from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import double_precision, judge, nudge
from cpm_bee.doctor.child import Context
from cpm_bee.encoding import Encoder
from cpm_bee.generate.beams import Beams
from cpm_bee.generate.decoder import Decoder, Shape
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.network import CPMBee

_RECORDS = 6
_STEPS = 4
_CPU = torch.device("cpu")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def generation(context: Context) -> None:
    model = workload.make_model(workload.make_config(context.device), lora=False).eval()
    for name, dtype in _DTYPES.items():
        held = copy.deepcopy(model).to(dtype)
        with double_precision():
            exact = _logits(copy.deepcopy(held).double(), _CPU)
        trusted = [_logits(held, _CPU)]
        for seed in (1, 2) if dtype == torch.float32 else ():
            nudged = copy.deepcopy(held)
            nudge(dict(nudged.named_parameters()), seed)
            trusted.append(_logits(nudged, _CPU))
        actual = _logits(held, context.device)
        context.add(judge(f"{name}, logits with a KV cache", actual, trusted, exact, dtype))
    expected = _answers(model, _CPU)
    found = _answers(model, context.device)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    text = f"{same} of {len(expected)} as on the CPU, with beams of 1 and 3"
    context.check("fp32, answers", same == len(expected), text)


@torch.inference_mode()
def _logits(model: CPMBee, device: torch.device) -> dict[str, torch.Tensor]:
    """Logits of each step of a fixed answer, for records of different lengths."""
    model = copy.deepcopy(model).to(device)
    tokenizer = workload.TOKENIZER
    found = {}
    for number, record in enumerate(workload.records(_RECORDS)):
        prompt = Prompt.of(record, Encoder(tokenizer))
        for step, logits in enumerate(_forced_logits(Decoder(model, tokenizer), prompt), start=1):
            # <unk> is forbidden: -inf in every dtype.
            found[f"record {number}, token {step}"] = logits.masked_fill(logits.isinf(), 0).cpu()
    return found


def _forced_logits(decoder: Decoder, prompt: Prompt) -> Iterator[torch.Tensor]:
    """Yields the logits [beams, C] of each step of two beams whose tokens are given."""
    tokenizer, slots = decoder.tokenizer, np.array([0])
    decoder.divide(Shape(1, len(prompt.encoded) + 1, _STEPS * 2), 2)
    beams = Beams(1, 2, _STEPS + 1, tokenizer.bos, tokenizer.eos)
    beams.start(0)
    states = decoder.prefill([prompt], [0])
    for step in range(1, _STEPS + 1):
        width = 1 if step == 1 else 2
        kept: list[torch.Tensor] = []

        def choose(
            logits: torch.Tensor,
            before: torch.Tensor,
            part: slice,
            kept: list[torch.Tensor] = kept,
            step: int = step,
            width: int = width,
        ) -> tuple[torch.Tensor, ...]:
            kept.append(logits.clone())
            numbers = torch.tensor([[len(tokenizer) - step - beam for beam in range(2)]])
            return torch.zeros(1, 2), torch.arange(2)[None] % width, numbers

        found = decoder.continuations(states, slots, beams.log_p[:, :width], 2, choose)
        yield kept[0]
        choice = beams.choose(slots, found, np.array([1]), np.array([False]))
        beams.advance(slots, found, choice)
        if step < _STEPS:
            states = decoder.step(beams, 1)


def _answers(model: CPMBee, device: torch.device) -> list[str]:
    generator = Generator(copy.deepcopy(model).to(device), workload.TOKENIZER)
    made = []
    for beam_size in (1, 3):
        options = GenerationOptions(beam_size=beam_size, max_length=12)
        for record in workload.records(_RECORDS):
            made.append(str(generator.generate(record, options)["<ans>"]))
    return made
