"""The tasks of the tiny base model's training; each function makes a record (docs/format.md §1).

They teach how to read records: which option contains a given word, and which words a given option
contains. The tutorial's own task and question, choosing the verse that renders a sentence, are left
to fine-tuning.
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
    """Distinct concepts of one slot."""
    return rng.sample(CONCEPTS[rng.choice(tuple(CONCEPTS))], count)


def choice(text: str, choices: Sequence[str], right: int, question: str) -> Record:
    """A multiple-choice record in the tutorial's form."""
    return {
        "input": text,
        "options": {f"<option_{i}>": option for i, option in enumerate(choices)},
        "question": question,
        "<ans>": f"<option_{right}>",
    }


def name_option(rng: random.Random) -> Record:
    """Write the option that the input names."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(2, 4))]
    right = rng.randrange(len(words))
    return {**choice(f"<option_{right}>", words, right, WRITE_OPTION), "<ans>": words[right]}


def same_word(rng: random.Random) -> Record:
    """Choose the option that equals the input."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(2, 4))]
    right = rng.randrange(len(words))
    return choice(words[right], words, right, EQUAL)


def same_words(rng: random.Random) -> Record:
    """Choose the options of several words at once; each word is a key of the answer."""
    words = [verse_word(concept, rng) for concept in some_concepts(rng, rng.randint(3, 8))]
    asked_for = rng.sample(range(len(words)), len(words) // 2)
    return {
        "options": {f"<option_{i}>": word for i, word in enumerate(words)},
        "<ans>": {words[i]: f"<option_{i}>" for i in asked_for},
    }


def numbered(rng: random.Random) -> Record:
    """Choose the first, second, ... option, regardless of its text."""
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
