"""What a run will need, before it starts: see `python plan.py --help` and docs/memory.md."""

from cpm_bee.cli import run_command
from cpm_bee.language import said
from cpm_bee.train.plan.options import PlanOptions


def main() -> None:
    options = PlanOptions.parse()
    from cpm_bee.train.plan.run import run_plan  # imported late: --help needs no torch

    print(said("\n".join(run_plan(options))))


if __name__ == "__main__":
    run_command(main)
