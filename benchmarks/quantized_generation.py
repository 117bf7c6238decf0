"""Measure the steps of generation with a model of 9.6 billion parameters in NF4 on the CPU.

    python benchmarks/quantized_generation.py --vocab bee.txt [--records 1,8]

The weights are random codes, made in memory (8 GB), because speed does not depend on their values.
Prints the CPU time of a step of this process, which uses one thread, for so many records at once
with one beam, next to the limit: the time to read all weights once at the bandwidth that reading
memory reaches in the same run. Short prompts; their time is printed apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import nn

from cpm_bee.encoding import Encoder
from cpm_bee.generate.beam_search import BeamSearch
from cpm_bee.generate.decoder import Decoder
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import insert_quantized_linears
from cpm_bee.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def make_model(config: ModelConfig) -> CPMBee:
    with torch.device("meta"):
        model = CPMBee(config)
    insert_quantized_linears(model, FORMATS["nf4"])
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            if value.dtype == torch.uint8:
                value.random_()
            elif name == "absmax":
                value.fill_(1)
            else:
                value.normal_()
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def read_seconds(num_bytes: int) -> float:
    """The time to read so many bytes, from the best of several reads of 1 GiB."""
    values = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        started = time.process_time()
        values.amax()
        times.append(time.process_time() - started)
    return min(times) * num_bytes / values.nbytes


def step_seconds(model: CPMBee, tokenizer: Tokenizer, num_records: int) -> tuple[float, float]:
    """CPU time of the first step, prompts included, and the median of the next ones."""
    options = GenerationOptions(beam_size=1, max_length=STEPS + 2)
    search = BeamSearch(Decoder(model, tokenizer), options, max_tokens=100 * num_records)
    encoder = Encoder(tokenizer)
    for _ in range(num_records):
        search.add(Prompt.of({"input": "春眠不觉晓", "<ans>": ""}, encoder))
    times = []
    for _ in range(STEPS + 1):
        started = time.process_time()
        search.step()
        times.append(time.process_time() - started)
    return times[0], statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--config", type=Path, default=ROOT / "config" / "cpm-bee-10b.json")
    parser.add_argument("--records", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(arguments.vocab)
    model = make_model(ModelConfig.load(arguments.config))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    limit = read_seconds(num_bytes)
    print(f"weights {num_bytes / 1e9:.2f} GB, read in {limit:.2f} s ({num_bytes / limit / 1e9:.1f} "
          "GB/s): the limit of a step", flush=True)  # fmt: skip
    for count in map(int, arguments.records.split(",")):
        first, step = step_seconds(model, tokenizer, count)
        assert math.isfinite(step)
        print(f"{count:3} records: first step {first:.1f} s, then {step:.2f} s a step, "
              f"{count / step:.2f} tokens/s (limit {count / limit:.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
