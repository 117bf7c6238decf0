"""Make the records that the tiny base model is trained on from random weights.

Writes train.jsonl and eval.jsonl, in the form of bee_data, to a folder. No record contains a scene
of the tutorial's evaluation set (`world.is_held_out`), its question or its task.
"""

from __future__ import annotations

import random
from pathlib import Path

from output import ArgumentParser, positive, run_command, whole_number, write_json_lines
from tasks import TASKS, Record

# The tasks of each stage, in equal shares. A model of this size learns to compare words faster if
# there is nothing else to learn.
STAGES = {
    "words": ("name_option", "same_word", "same_words"),
    "lines": ("name_option", "same_word", "same_words", "numbered"),
}


class Mixture:
    """Records of the tasks of a stage, in random order."""

    def __init__(self, stage: str, seed: str) -> None:
        self._names = STAGES[stage]
        self._rng = random.Random(seed)

    def __call__(self) -> Record:
        [name] = self._rng.choices(self._names)
        return TASKS[name](self._rng)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--stage", choices=tuple(STAGES), required=True)
    parser.add_argument("--train", type=positive, default=100_000, help="training records")
    parser.add_argument("--eval", type=positive, default=500, help="evaluation records")
    parser.add_argument("--seed", type=whole_number, default=2024)
    arguments = parser.parse_args()
    for name in ("train", "eval"):
        make = Mixture(arguments.stage, f"{arguments.seed} {name}")
        write_json_lines(arguments.output / f"{name}.jsonl", make, getattr(arguments, name))


if __name__ == "__main__":
    run_command(main)
