"""Measure generation in batches on the CPU, against one record at a time and against bare products.

    python benchmarks/generation.py --data BEE.jsonl --vocab bee.txt [--model 512x8]
    python benchmarks/generation.py --data BEE.jsonl --vocab bee.txt --model 64x2 --answers 10000

The first form generates 33 tokens for each of 32 records with beam 3 (random weights; `</s>` is
made so improbable that no answer ends early) in three ways, in turn, `--rounds` times: all together
as text_generation.py does; one at a time as it did before (one_by_one.py), for fewer records; and
the matrix products of all together alone, with the same weights and shapes, in the same order.
A record-step is one token of one record, prompts included in the time. Times are CPU time of this
process, which uses one thread: a busy machine disturbs them less than wall-clock time.

The second form generates so many short answers in one go and prints the resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import one_by_one
import torch
import torch.nn.functional as F

from cpm_bee.generate.decoder import _WINDOW_SLOTS
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.prompt import Prompt
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "64x2": {"dim_model": 64, "num_heads": 2, "dim_head": 32, "dim_ff": 160, "num_layers": 2},
    "256x4": {"dim_model": 256, "num_heads": 4, "dim_head": 64, "dim_ff": 640, "num_layers": 4},
    "512x8": {"dim_model": 512, "num_heads": 8, "dim_head": 64, "dim_ff": 1280, "num_layers": 8},
}


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def make_model(tokenizer: Tokenizer, size: str) -> CPMBee:
    """A random model that never ends an answer: many logits are higher than that of `</s>`, 0."""
    model = CPMBee(ModelConfig(vocab_size=len(tokenizer), **SIZES[size]))
    model.load_state_dict(dict(initial_values(model, 0)))
    with torch.no_grad():
        model.input_embedding.weight[tokenizer.eos] = 0
    return model.eval()


# ------------------------------------------------------------------ the products alone


class Products:
    """The matrix products that generating `prompts` together needs."""

    def __init__(self, model: CPMBee, prompts: list[Prompt], options: GenerationOptions) -> None:
        self.model, self.beam_size = model, options.num_beams
        self.records, self.steps = len(prompts), options.max_length + 2
        lengths = sorted((len(prompt.encoded) + 1 for prompt in prompts), reverse=True)
        self.prompt_tokens = sum(lengths)
        # Records that share a product of attention: their number and the longest prompt.
        parts = [lengths[i : i + _WINDOW_SLOTS] for i in range(0, len(lengths), _WINDOW_SLOTS)]
        self.windows = [(len(part) * model.config.num_heads, part[0]) for part in parts]
        config = model.config
        shape = (self.records * config.num_heads, -1, config.dim_head)
        columns = lengths[0] + self.steps * self.beam_size
        size = self.records * config.num_heads * columns * config.dim_head
        # Of each layer its own, as in the cache: all of them do not fit in the processor's.
        self.cached = [torch.randn(2, size).view(2, *shape) for _ in range(config.num_layers)]
        self.inputs: dict[tuple[int, int], torch.Tensor] = {}

    def linear(self, layer: Linear, rows: int) -> None:
        F.linear(self.input(rows, layer.dim_in), layer.weight)

    def input(self, rows: int, dim: int) -> torch.Tensor:
        if (rows, dim) not in self.inputs:
            self.inputs[rows, dim] = torch.randn(rows, dim)
        return self.inputs[rows, dim]

    def vocabulary(self, rows: int) -> None:
        """In the faster of the two orders for so many rows, in pieces (see `Embedding`)."""
        weight = self.model.input_embedding.weight
        out = self.input(rows, len(weight))
        self.model.input_embedding.vocabulary_logits(self.input(rows, weight.shape[1]), out)

    def attention(self, layer: int, step: int) -> None:
        dim = self.model.config.dim_head
        first = 0
        for size, longest in self.windows:
            width = longest + step * self.beam_size
            keys, values = self.cached[layer][:, first : first + size, :width]
            q = self.input(size * self.beam_size, dim).view(size, self.beam_size, dim)
            torch.bmm(torch.bmm(q, keys.mT), values)
            first += size

    @torch.inference_mode()
    def run(self, *, attention: bool = True) -> None:
        """Prompts (in the last layer, only their last token needs more than keys and values)."""
        records, rows = self.records, self.records * self.beam_size
        last = self.model.config.num_layers - 1
        for name, layer in self.linears():
            is_kv = name.endswith(("project_k", "project_v"))
            few = f".{last}." in name and not is_kv
            self.linear(layer, records if few else self.prompt_tokens)
        self.vocabulary(records)
        for step in range(1, self.steps):
            for name, layer in self.linears():
                self.linear(layer, rows)
                if attention and name.endswith("project_v"):
                    self.attention(int(name.split(".")[2]), step)
            self.vocabulary(rows)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        return ((n, m) for n, m in self.model.named_modules() if isinstance(m, Linear))


# ------------------------------------------------------------------ the two forms


def compare(model: CPMBee, tokenizer: Tokenizer, records: list[Record], rounds: int) -> None:
    generator = Generator(model, tokenizer)
    options = GenerationOptions(beam_size=3, max_length=31)  # 33 tokens
    prompts = [Prompt.of(record, generator.encoder) for record in records]
    steps = options.max_length + 2
    products = Products(model, prompts, options)
    answers: dict[int, Any] = {}
    speeds: dict[str, list[float]] = {}

    def alone(numbers: range) -> None:
        with torch.inference_mode():
            for i in numbers:
                decoder = one_by_one.Decoder(model, tokenizer, prompts[i])
                search = one_by_one.Search(decoder, tokenizer, len(prompts[i].answers), options)
                answers[i] = [t.id for t in search.run() if t.position > 0]

    together = [output.job for output in generator.search(records, options)]  # a warm-up, too
    for index in range(rounds):
        few = range(4 * index % len(records), 4 * index % len(records) + 4)
        times = {
            "together": seconds(lambda: list(generator.stream(records, options))) / len(records),
            "one by one": seconds(lambda few=few: alone(few)) / len(few),  # type: ignore[misc]
            "products": seconds(products.run) / len(records),
            "without attention": seconds(lambda: products.run(attention=False)) / len(records),
        }
        for name, time_ in times.items():
            speeds.setdefault(name, []).append(steps / time_)
        print(", ".join(f"{name} {steps / t:.1f}" for name, t in times.items()), flush=True)
    equal = sum(
        [pair[0] for answer in job.answers() for pair in answer] == answers[i]
        for i, job in enumerate(together)
        if job is not None and i in answers
    )
    print(f"equal answers of both ways: {equal} of {len(answers)}")
    for name, values in speeds.items():
        print(f"{name:18} {statistics.median(values):8.1f} record-steps/s, median")
    for name in list(speeds)[1:]:
        ratios = [a / b for a, b in zip(speeds["together"], speeds[name], strict=True)]
        print(f"together / {name:18} {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def resident_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        [line] = [line for line in file if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def many(model: CPMBee, tokenizer: Tokenizer, records: list[Record], count: int) -> None:
    generator = Generator(model, tokenizer)
    stream = itertools.islice(itertools.cycle(records), count)
    options = GenerationOptions(beam_size=3, max_length=4)
    for number, _ in enumerate(generator.stream(stream, options), start=1):
        if number % (count // 10) == 0:
            print(f"{number:6} answers: {resident_mib():.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="bee records, one per line")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--model", choices=SIZES, default="512x8")
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--answers", type=int, help="measure the memory of so many answers")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(arguments.vocab)
    model = make_model(tokenizer, arguments.model)
    size = 1000 if arguments.answers else arguments.records
    with open(arguments.data, encoding="utf-8") as file:
        records = [json.loads(line) for line in itertools.islice(file, size)]
    print(f"model {arguments.model}, {len(records)} records, 1 thread, torch {torch.__version__}")
    if arguments.answers:
        many(model, tokenizer, records, arguments.answers)
        return
    compare(model, tokenizer, records, arguments.rounds)
    if arguments.profile:
        options = GenerationOptions(beam_size=3, max_length=31)
        with torch.profiler.profile() as profile:
            list(Generator(model, tokenizer).stream(records, options))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
