"""Answer records with a model: see `python text_generation.py --help` and docs/generation.md."""

from __future__ import annotations

import sys

from cpm_bee.cli import run_command
from cpm_bee.generate.options import TextGenerationOptions


def main() -> None:
    options = TextGenerationOptions.parse()
    # Imported late, since torch is slow to load: --help and usage errors are immediate.
    from cpm_bee import delta, pretrained
    from cpm_bee.engine.device import choose_device, choose_dtype
    from cpm_bee.generate.beam_search import Generator
    from cpm_bee.generate.jsonl import STANDARD, check_output, generate_file, read_records

    check_output(options.output, (options.input, options.load, options.delta, options.vocab))
    records = read_records(options.input, escape=options.escape)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    model = (options.load, options.model_config, options.vocab)
    loaded = pretrained.load_pretrained(*model, dtype, device, quantize=options.quantize)
    if options.delta is not None:
        prints = (loaded.fingerprint, loaded.tokenizer.fingerprint)
        delta.load(loaded.model, options.delta, *prints, alpha=options.delta_alpha)
    generator = Generator(loaded.model, loaded.tokenizer)
    score = generate_file(
        generator, records, options, options.output, resume=options.resume, escaped=options.escape
    )
    messages = sys.stderr if options.output == STANDARD else sys.stdout
    print(f"{len(records):,} records written", file=messages)
    if score.answered:
        print(score, file=messages)


if __name__ == "__main__":
    run_command(main)
