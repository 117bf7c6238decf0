"""Generated scenes, described in a plain sentence or rendered in a line of verse.

A scene fills the slots of a shape with concepts (`lexicon.py`). Scenes are divided once into those
of the evaluation set and all others, so that no record of another set contains an evaluation scene.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import TypeAlias

from lexicon import CONCEPTS, Concept

Scene: TypeAlias = tuple[Concept, ...]

# Slots in the order of the verse -> templates of the plain sentence.
SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("who", "act"): ("{who}正在{act}。", "{who}独自{act}。", "有{who}在那里{act}。"),
    ("time", "see"): ("{time}，{see}。", "{time}只见{see}。"),
    ("place", "see"): ("{place}，{see}。", "{place}只见{see}。"),
    ("place", "act"): ("在{place}{act}。", "{place}，有人在{act}。"),
    ("time", "who", "act"): ("{time}，{who}正在{act}。", "{who}{time}独自{act}。"),
    ("place", "who", "act"): ("{who}在{place}{act}。", "{place}，{who}正在{act}。"),
    ("time", "place", "see"): ("{time}，{place}{see}。", "{place}，{time}只见{see}。"),
}
HELD_OUT_SHARE = 4  # one in this number of scenes belongs to the evaluation set


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the evaluation set; a fixed property of its concepts."""
    name = " ".join(f"{concept.slot}:{concept.number}" for concept in scene)
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of a random shape, held out or not."""
    shape = rng.choice(tuple(SHAPES))
    while True:
        scene = tuple(rng.choice(CONCEPTS[slot]) for slot in shape)
        if is_held_out(scene) == held_out:
            return scene


def plain_sentence(scene: Scene, rng: random.Random) -> str:
    """A scene as a plain sentence, with random wordings."""
    template = rng.choice(SHAPES[tuple(concept.slot for concept in scene)])
    return template.format(**{concept.slot: rng.choice(concept.plain) for concept in scene})


def verse(scene: Scene, rng: random.Random) -> str:
    """A scene as a line of verse of 5 or 7 characters, with random wordings."""
    return "".join(rng.choice(concept.verse) for concept in scene)


def options(right: Scene, count: int, rng: random.Random) -> list[Scene]:
    """The right scene and others, `count` distinct scenes of its shape in random order.

    All are held out or none. The others share concepts with the right one, in a pattern that is
    the same seen from each option, so that the options alone do not reveal the right one.
    """
    held_out = is_held_out(right)
    while True:
        scenes = _related(right, count, rng)
        if len(set(scenes)) == count and all(is_held_out(s) == held_out for s in scenes):
            rng.shuffle(scenes)
            return scenes


def _related(right: Scene, count: int, rng: random.Random) -> list[Scene]:
    if count % 2 or rng.random() < 0.25:  # no pattern: unrelated scenes
        unrelated = [
            tuple(rng.choice(CONCEPTS[concept.slot]) for concept in right) for _ in range(count - 1)
        ]
        return [right, *unrelated]
    other = tuple(rng.choice(CONCEPTS[concept.slot]) for concept in right)
    return [_mix(right, other, pattern) for pattern in _patterns(len(right), count, rng)]


def _patterns(slots: int, count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """For each option, which slots take the other scene's concept; none do in the first."""
    if count == 2:
        changed = rng.randrange(slots)
        return [(0,) * slots, tuple(int(slot == changed) for slot in range(slots))]
    if slots == 3 and rng.random() < 0.5:  # any two options have one concept in common
        return [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    # Two slots vary, over all combinations of their two concepts.
    first, second = rng.sample(range(slots), 2)
    rows = []
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = [0] * slots
        row[first], row[second] = a, b
        rows.append(tuple(row))
    return rows


def _mix(right: Scene, other: Scene, pattern: Sequence[int]) -> Scene:
    return tuple(o if changed else r for r, o, changed in zip(right, other, pattern, strict=True))
