"""Verify a run by its receipt: see `python verify.py --help` and docs/reproducing.md."""

from cpm_bee.cli import run_command
from cpm_bee.language import said
from cpm_bee.train.replay_options import ReplayOptions


def main() -> int:
    options = ReplayOptions.parse()
    from cpm_bee.train.replay import verify  # imported late: --help needs no torch

    report, status = verify(options)
    print(said(report))
    return status


if __name__ == "__main__":
    run_command(main)
