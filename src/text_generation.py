"""Answer records with a model: see `python text_generation.py --help` and docs/generation.md."""

from __future__ import annotations

import sys

from cpm_bee.cli import run_command
from cpm_bee.errors import InputError
from cpm_bee.generate.options import GenerationOptions, TextGenerationOptions
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
    else:
        answer_prompts(options)


def answer_file(options: TextGenerationOptions, path: str, output: str) -> None:
    # Imported late, with torch: --help and wrong usage answer at once.
    from cpm_bee.data.record_source import STANDARD, read_records
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.jsonl import (
        ChoiceOptions,
        check_choices,
        check_output,
        check_resume,
        generate_file,
    )
    from cpm_bee.generate.loaded_model import load_model

    check_output(output, options.files_read())
    records = read_records(path, keep=options.keep, escape=options.escape)
    if options.choices is not None:
        check_choices(records)
    check_resume(output, records, resume=options.resume)
    loaded = load_model(options)
    # The flags that decide the answers, with their values.
    settings = {flag.flag: getattr(options, flag.name) for flag in flags_of(GenerationOptions)}
    settings |= {**loaded.settings, "--escape": options.escape, "--keep": options.keep}
    settings |= {"--choices": options.choices, "--abstain-below": options.abstain_below}
    score = generate_file(
        Generator(loaded.base.model, loaded.base.tokenizer),
        records,
        options,
        output,
        settings,
        resume=options.resume,
        escape=options.escape,
        max_tokens=options.max_tokens,
        choices=ChoiceOptions.of(options),
    )
    messages = sys.stderr if output == STANDARD else sys.stdout
    print("\n".join([f"{len(records):,} records written", *score.lines()]), file=messages)


def answer_prompts(options: TextGenerationOptions) -> None:
    from cpm_bee.generate.console import Console, converse, record_of
    from cpm_bee.generate.generator import Generator
    from cpm_bee.generate.loaded_model import load_model

    if options.prompt is not None:  # a mistake is told before the model is loaded
        record_of(options.prompt, options.instruction, escape=options.escape)
    loaded = load_model(options)
    console = Console(Generator(loaded.base.model, loaded.base.tokenizer), options)
    if options.prompt is None:
        converse(console)
    else:
        console.answer(options.prompt)


if __name__ == "__main__":
    run_command(main)
