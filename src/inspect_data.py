"""Look at data before training: see `python inspect_data.py --help` and docs/data.md."""

from __future__ import annotations

from cpm_bee.cli import run_command
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.errors import InputError


def main() -> None:
    options = InspectOptions.parse()
    from cpm_bee.data.inspect.run import inspect_data
    from preprocess_dataset import load_vocabulary

    tokenizer = load_vocabulary(options.vocab)
    if tokenizer is None:
        raise InputError("no vocabulary: give that of your model with --vocab FILE")
    print(inspect_data(options, tokenizer))


if __name__ == "__main__":
    run_command(main)
