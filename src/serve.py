"""Serve a model over HTTP: see `python serve.py --help` and docs/serving.md."""

from cpm_bee.cli import run_command
from cpm_bee.serve.options import ServeOptions


def main() -> None:
    options = ServeOptions.parse()
    from cpm_bee.serve.run import serve  # imported late: --help needs no torch

    serve(options)


if __name__ == "__main__":
    run_command(main)
