"""Merge deltas into a model: see `python merge_delta.py --help` and docs/checkpoints.md."""

from __future__ import annotations

from pathlib import Path

from cpm_bee.checkpoint.options import MergeOptions, generation_command
from cpm_bee.cli import run_command
from cpm_bee.language import said


def main() -> None:
    options = MergeOptions.parse()
    from cpm_bee.checkpoint.merge import merge  # imported late: --help needs no torch

    report = merge(options)
    deltas = "1 delta" if len(options.delta) == 1 else f"{len(options.delta)} deltas"
    print(said(f"written: {options.output}, {deltas} merged into {report.num_layers} layers"))
    print(
        said(
            f"checked on a record of {report.num_tokens} tokens: the logits differ by "
            f"{report.error:.1e} of their size from those of base and deltas (rounding to "
            f"{report.dtypes} explains up to {report.allowed:.1e})"
        )
    )
    source = Path(__file__).absolute().parent
    print(said(generation_command(source, "--load", str(Path(options.output).absolute()))))


if __name__ == "__main__":
    run_command(main)
