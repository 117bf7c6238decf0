"""Convert models and deltas: see `python convert_checkpoint.py --help` and docs/checkpoints.md."""

from __future__ import annotations

from pathlib import Path

from cpm_bee.checkpoint.options import DELTA, PEFT, ConvertOptions, generation_command
from cpm_bee.cli import run_command
from cpm_bee.language import said


def main() -> None:
    options = ConvertOptions.parse()
    from cpm_bee.checkpoint.convert import convert  # imported late: --help needs no torch

    convert(options)
    print(said("\n".join([f"written: {options.output}", *next_step(options)])))


def next_step(options: ConvertOptions) -> list[str]:
    """Returns the next step: how to use the result."""
    output = str(Path(options.output).absolute())
    if options.to == PEFT:
        return [
            f"next, in Python: model = PeftModel.from_pretrained(model, {output!r})",
            "PEFT's merge_and_unload does not know this model's factor sqrt(dim_in): merge with "
            "merge_delta.py",
        ]
    if options.to == DELTA and options.load is None:
        return ["the base is not recorded, because no --load was given"]
    source = Path(__file__).absolute().parent
    if options.to != DELTA:
        return [generation_command(source, "--load", output)]
    flags = ["--load", str(Path(options.load or "").absolute()), "--delta", output]
    if options.vocab is not None:
        flags += ["--vocab", str(Path(options.vocab).absolute())]
    return [generation_command(source, *flags)]


if __name__ == "__main__":
    run_command(main)
