"""Evaluate a model: see `python evaluate.py --help` and docs/evaluation.md."""

from cpm_bee.cli import run_command
from cpm_bee.evaluate.options import EvaluateOptions


def main() -> None:
    options = EvaluateOptions.parse()
    from cpm_bee.evaluate.run import evaluate  # imported late: --help needs no torch

    print(evaluate(options))


if __name__ == "__main__":
    run_command(main)
