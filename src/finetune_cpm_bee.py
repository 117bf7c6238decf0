"""Fine-tune a CPM-Bee model: see `python finetune_cpm_bee.py --help` and docs/training.md."""

from cpm_bee.cli import run_command
from cpm_bee.train.options import Options


def main() -> None:
    options = Options.parse()
    from cpm_bee.train.setup import finetune  # imported late: --help needs no torch

    finetune(options)


if __name__ == "__main__":
    run_command(main)
