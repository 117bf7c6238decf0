"""Step `generation` of `doctor.py --gpu`: the logits of decoding in each dtype, and the answers."""

from __future__ import annotations

import copy

import torch

from cpm_bee.doctor import workload
from cpm_bee.doctor.bounds import double_precision, judge, nudge
from cpm_bee.doctor.child import Context
from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import Generator
from cpm_bee.generate.decoder import Decoder, Token
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.network import CPMBee

_RECORDS = 6
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
        decoder = Decoder(model, tokenizer, Prompt.of(record, Encoder(tokenizer)))
        beams: list[tuple[Token, ...]] = [(Token(tokenizer.bos, 0, 0, 0),)] * 2
        for step in range(1, 5):
            logits = decoder.logits(beams, [0, 0] if step == 1 else [0, 1])
            # <unk> is forbidden: -inf in every dtype.
            found[f"record {number}, token {step}"] = logits.masked_fill(logits.isinf(), 0).cpu()
            more = [len(tokenizer) - step - b for b in range(2)]
            beams = [(*b, Token(t, 0, 0, step)) for b, t in zip(beams, more, strict=True)]
    return found


def _answers(model: CPMBee, device: torch.device) -> list[str]:
    generator = Generator(copy.deepcopy(model).to(device), workload.TOKENIZER)
    made = []
    for beam_size in (1, 3):
        options = GenerationOptions(beam_size=beam_size, max_length=12)
        for record in workload.records(_RECORDS):
            made.append(str(generator.generate(record, options)["<ans>"]))
    return made
