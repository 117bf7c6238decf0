"""Answer records with a model: see `python text_generation.py --help` and docs/generation.md."""

from __future__ import annotations

import sys

from cpm_bee.cli import run_command
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.generate.options import GenerationOptions, TextGenerationOptions
from cpm_bee.options import flags_of


def main() -> None:
    options = TextGenerationOptions.parse()
    # Imported late, with torch: --help and wrong usage answer at once.
    from cpm_bee.generate import shared_file
    from cpm_bee.generate.examples import example_settings, read_examples
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.jsonl import (
        STANDARD,
        check_output,
        check_resume,
        generate_file,
        read_records,
    )
    from cpm_bee.generate.loaded_model import load_model

    rank = RankInfo.of_this_process()
    several = rank.world_size > 1
    if several:
        shared_file.check_names(options.input, options.output)
    check_output(options.output, options.files_read())
    records = read_records(options.input, escape=options.escape)
    examples = read_examples(options.examples, escape=options.escape)
    shared_file.refuse_other_shares(options.output, rank.world_size)
    check = shared_file.check_shares if several else check_resume
    check(options.output, records, resume=options.resume)
    loaded = load_model(options)
    # The flags that decide the answers, with their values.
    settings = {flag.flag: getattr(options, flag.name) for flag in flags_of(GenerationOptions)}
    settings |= {**loaded.settings, "--escape": options.escape}
    settings |= example_settings(options.examples)
    generator = Generator(loaded.base.model, loaded.base.tokenizer, examples)
    generate = shared_file.generate_shared if several else generate_file
    score = generate(
        generator,
        records,
        options,
        options.output,
        settings,
        resume=options.resume,
        escape=options.escape,
        max_tokens=options.max_tokens,
    )
    if rank.rank > 0:
        return
    messages = sys.stderr if options.output == STANDARD else sys.stdout
    print(f"{len(records):,} records written", file=messages)
    if score.answered:
        print(score, file=messages)


if __name__ == "__main__":
    run_command(main)
