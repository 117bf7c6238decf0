"""Answer records with a model: see `python text_generation.py --help` and docs/generation.md."""

from __future__ import annotations

import sys

from cpm_bee.cli import run_command
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import InputError
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.language import said
from cpm_bee.options import flags_of


def main() -> None:
    options = TextGenerationOptions.parse()
    if options.input is not None:
        answer_file(options, options.input, options.output or "")
    elif options.prompt is None and not sys.stdin.isatty():
        raise InputError(
            "nothing to answer: give --input FILE --output FILE (- is standard input and output), "
            "or --prompt RECORD; without them records are asked for on a terminal"
        )
    elif RankInfo.of_this_process().world_size > 1:
        raise InputError("--prompt and the terminal are for one process; torchrun needs --input")
    else:
        answer_prompts(options)


def answer_file(options: TextGenerationOptions, path: str, output: str) -> None:
    # Imported late, with torch: --help and wrong usage answer at once.
    from cpm_bee.data.record_source import STANDARD, read_records
    from cpm_bee.generate import jsonl, shared_file
    from cpm_bee.generate.examples import example_settings, read_examples
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.loaded_model import load_model

    rank = RankInfo.of_this_process()
    several = rank.world_size > 1
    if several:
        shared_file.check_names(path, output)
    jsonl.check_output(output, options.files_read())
    records = read_records(path, keep=options.keep, escape=options.escape)
    if options.choices is not None:
        jsonl.check_choices(records)
    examples = read_examples(options.examples, escape=options.escape)
    shared_file.refuse_other_shares(output, rank.world_size)
    check = shared_file.check_shares if several else jsonl.check_resume
    check(output, records, resume=options.resume)
    loaded = load_model(options)
    # The flags that decide the answers, with their values.
    settings = {flag.flag: getattr(options, flag.name) for flag in flags_of(GenerationOptions)}
    settings |= {**loaded.settings, "--escape": options.escape, "--keep": options.keep}
    settings |= {"--choices": options.choices, "--abstain-below": options.abstain_below}
    settings |= example_settings(options.examples)
    generate = shared_file.generate_shared if several else jsonl.generate_file
    score = generate(
        Generator(loaded.base.model, loaded.base.tokenizer, examples),
        records,
        output,
        jsonl.FileOptions.of(options, settings),
    )
    if rank.rank == 0:
        messages = sys.stderr if output == STANDARD else sys.stdout
        lines = [f"{len(records):,} records written", *score.lines()]
        print(said("\n".join(lines)), file=messages)


def answer_prompts(options: TextGenerationOptions) -> None:
    from cpm_bee.generate.console import Console, converse, record_of
    from cpm_bee.generate.examples import read_examples
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.loaded_model import load_model

    if options.prompt is not None:  # a mistake is told before the model is loaded
        record_of(options.prompt, options.instruction, escape=options.escape)
    examples = read_examples(options.examples, escape=options.escape)
    loaded = load_model(options)
    console = Console(Generator(loaded.base.model, loaded.base.tokenizer, examples), options)
    if options.prompt is None:
        converse(console)
    else:
        console.answer(options.prompt)


if __name__ == "__main__":
    run_command(main)
