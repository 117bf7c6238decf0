"""Make the sample data of the tutorial: choose the line of verse that renders a plain sentence.

Writes raw_data/train.jsonl and raw_data/eval.jsonl in the tutorial's raw format (docs/format.md
§1). The same seed gives the same bytes. The two sets share no scene, not even in wrong options.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from output import ArgumentParser, positive, run_command, whole_number, write_json_lines
from world import options, plain_sentence, random_scene, verse

ROOT = Path(__file__).resolve().parents[2]
NUM_OPTIONS = 4


def record_maker(rng: random.Random, held_out: bool) -> Callable[[], dict[str, str]]:
    """Returns a function that makes a new raw record at each call; sentences do not repeat."""
    used: set[str] = set()

    def make() -> dict[str, str]:
        scene = random_scene(rng, held_out)
        text = plain_sentence(scene, rng)
        if text in used:
            return make()
        used.add(text)
        scenes = options(scene, NUM_OPTIONS, rng)
        choices = "".join(f"[{i}]{verse(option, rng)}" for i, option in enumerate(scenes))
        return {"target": str(scenes.index(scene)), "input": f"[翻译]{text}{choices}[答案]"}

    return make


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "raw_data", help="folder")
    parser.add_argument("--train", type=positive, default=3000, help="training records")
    parser.add_argument("--eval", type=positive, default=400, help="evaluation records")
    parser.add_argument("--seed", type=whole_number, default=2024)
    arguments = parser.parse_args()
    for name, held_out in (("train", False), ("eval", True)):
        # Each file has its own seed, so that the size of one does not change the other.
        make = record_maker(random.Random(f"{arguments.seed} {name}"), held_out)
        write_json_lines(arguments.output / f"{name}.jsonl", make, getattr(arguments, name))


if __name__ == "__main__":
    run_command(main)
