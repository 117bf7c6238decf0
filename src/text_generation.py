"""Answer records with a model: see `python text_generation.py --help` and docs/generation.md."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from cpm_bee.cli import run_command
from cpm_bee.generate.options import GenerationOptions, TextGenerationOptions
from cpm_bee.options import flags_of


def main() -> None:
    options = TextGenerationOptions.parse()
    # Imported late, with torch: --help and wrong usage answer at once.
    from cpm_bee import delta, pretrained
    from cpm_bee.engine.device import choose_device, choose_dtype, use_device
    from cpm_bee.generate.beam_search import Generator
    from cpm_bee.generate.jsonl import (
        STANDARD,
        check_output,
        check_resume,
        generate_file,
        read_records,
    )

    check_output(options.output, options.files_read())
    records = read_records(options.input, escape=options.escape)
    check_resume(options.output, records, resume=options.resume)
    device = use_device(choose_device(options.device))
    dtype = choose_dtype(options.dtype, device)
    model = (options.load, options.model_config, options.vocab)
    loaded = pretrained.load_pretrained(
        *model, dtype, device, quantize=options.quantize, verify=options.verify
    )
    settings = settings_of(options, str(dtype).removeprefix("torch."), device.type)
    prints = (loaded.fingerprint, loaded.tokenizer.fingerprint)
    settings |= {"--load": shortened(prints[0]), "--vocab": shortened(prints[1])}
    if options.delta is not None:
        config = delta.load(loaded.model, options.delta, *prints, alpha=options.delta_alpha)
        digest = hashlib.sha256(Path(options.delta).read_bytes()).hexdigest()
        settings |= {"--delta": shortened(digest), "--delta-alpha": config.alpha}
    generator = Generator(loaded.model, loaded.tokenizer)
    score = generate_file(
        generator,
        records,
        options,
        options.output,
        settings,
        resume=options.resume,
        escape=options.escape,
    )
    messages = sys.stderr if options.output == STANDARD else sys.stdout
    print(f"{len(records):,} records written", file=messages)
    if score.answered:
        print(score, file=messages)


def settings_of(options: TextGenerationOptions, dtype: str, device: str) -> dict[str, Any]:
    """The flags that decide the answers, with their values; without the files of the model."""
    search = {flag.flag: getattr(options, flag.name) for flag in flags_of(GenerationOptions)}
    machine = {"--dtype": dtype, "--device": device, "--quantize": options.quantize}
    return {**search, **machine, "--escape": options.escape}


def shortened(digest: str) -> str:
    return f"fingerprint {digest[:12]}"


if __name__ == "__main__":
    run_command(main)
