"""The tasks that the tiny base model is trained on, each a maker of records (docs/format.md §1).

They teach how records are read: which option holds a given word, and which words a given option
holds. The tutorial's own task, choosing the verse that renders a sentence, is not among them, and
neither is its question: that is left to tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lexicon import CONCEPTS, Concept
from world import options, plain_sentence, random_scene, verse

Record: TypeAlias = dict[str, "str | dict[str, str]"]
Task: TypeAlias = Callable[[random.Random], Record]

EQUAL = "哪一项与原文相同？"
WRITE_OPTION = "写出这一项"


def verse_word(concept: Concept, rng: random.Random) -> str:
    return rng.choice(concept.verse)


def some_concepts(rng: random.Random, count: int) -> list[Concept]:
    """Different concepts of one slot."""
    return rng.sample(CONCEPTS[rng.choice(tuple(CONCEPTS))], count)


def choice(text: str, choices: Sequence[str], right: int, question: str) -> Record:
    """A multiple-choice record, in the form of the tutorial's."""
    return {
        "input": text,
        "options": {f"<option_{i}>": option for i, option in enumerate(choices)},
        "question": question,
        "<ans>": f"<option_{right}>",
    }


def name_option(rng: random.Random) -> Record:
    """Write down the option that the input points to."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(2, 4))]
    right = rng.randrange(len(words))
    return {**choice(f"<option_{right}>", words, right, WRITE_OPTION), "<ans>": words[right]}


def same_word(rng: random.Random) -> Record:
    """Which option is the input, word for word."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(2, 4))]
    right = rng.randrange(len(words))
    return choice(words[right], words, right, EQUAL)


def same_words(rng: random.Random) -> Record:
    """The options of several words at once, each word a key of the answer."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(3, 8))]
    asked_for = rng.sample(range(len(words)), len(words) // 2)
    return {
        "options": {f"<option_{i}>": word for i, word in enumerate(words)},
        "<ans>": {words[i]: f"<option_{i}>" for i in asked_for},
    }


def numbered(rng: random.Random) -> Record:
    """Which option is the first, second, ..., whatever it holds."""
    scene = random_scene(rng)
    scenes = options(scene, rng.randint(2, 4), rng)
    right = rng.randrange(len(scenes))
    lines = [verse(option, rng) for option in scenes]
    return choice(plain_sentence(scene, rng), lines, right, f"第{'一二三四'[right]}项是哪一项？")


TASKS: dict[str, Task] = {
    "name_option": name_option,
    "same_word": same_word,
    "same_words": same_words,
    "numbered": numbered,
}
