"""The tasks that the tiny base model is trained on, each a maker of records (SPEC §1).

They teach what the words of the small world mean and how records are read: copying, naming an
option, finding the option that equals or renders a text. The tutorial's own task, choosing the
verse for a plain sentence, is not among them, and neither is its question: that is left to tuning.
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
IN_VERSE = "诗语是哪一项？"
IN_PLAIN = "白话是哪一项？"
WRITE_OPTION = "写出这一项"


def plain_word(concept: Concept, rng: random.Random) -> str:
    return rng.choice(concept.plain)


def verse_word(concept: Concept, rng: random.Random) -> str:
    return rng.choice(concept.verse)


Word: TypeAlias = Callable[[Concept, random.Random], str]


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


# ------------------------------------------------------------------ words


def copy(rng: random.Random) -> Record:
    """Write the input down again."""
    word = rng.choice((plain_word, verse_word))(some_concepts(rng, 1)[0], rng)
    return {"input": word, "prompt": "抄写", "<ans>": word}


def dictionary(rng: random.Random) -> Record:
    """A verse word for a plain one, or the other way."""
    [concept] = some_concepts(rng, 1)
    plain, poetic = plain_word(concept, rng), verse_word(concept, rng)
    if rng.random() < 0.5:
        return {"input": plain, "prompt": "写成诗句", "<ans>": poetic}
    return {"input": poetic, "prompt": "写成白话", "<ans>": plain}


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


def match_word(given: Word, offered: Word, question: str) -> Task:
    """Which option means the same as the input, in the other kind of words."""

    def make(rng: random.Random) -> Record:
        concepts = some_concepts(rng, rng.randint(2, 4))
        right = rng.randrange(len(concepts))
        words = [offered(concept, rng) for concept in concepts]
        return choice(given(concepts[right], rng), words, right, question)

    return make


def match_words(asked: Word, offered: Word) -> Task:
    """The options of several words at once, each word a key of the answer."""

    def make(rng: random.Random) -> Record:
        concepts = some_concepts(rng, rng.randint(3, 8))
        texts = [offered(concept, rng) for concept in concepts]
        keys = texts if asked is offered else [asked(concept, rng) for concept in concepts]
        asked_for = rng.sample(range(len(texts)), len(texts) // 2)
        return {
            "options": {f"<option_{i}>": text for i, text in enumerate(texts)},
            "<ans>": {keys[i]: f"<option_{i}>" for i in asked_for},
        }

    return make


# ------------------------------------------------------------------ lines


def render(rng: random.Random) -> Record:
    """Turn a plain sentence into a line of verse."""
    scene = random_scene(rng)
    return {
        "input": plain_sentence(scene, rng),
        "prompt": "写成诗句",
        "<ans>": verse(scene, rng),
    }


def explain(rng: random.Random) -> Record:
    """Turn a line of verse into a plain sentence."""
    scene = random_scene(rng)
    return {
        "input": verse(scene, rng),
        "prompt": "写成白话",
        "<ans>": plain_sentence(scene, rng),
    }


def same_line(rng: random.Random) -> Record:
    """Which line of verse is the input, word for word."""
    scene = random_scene(rng)
    scenes = options(scene, rng.randint(2, 4), rng)
    lines = [verse(option, rng) for option in scenes]
    right = scenes.index(scene)
    return choice(lines[right], lines, right, EQUAL)


def explain_by_option(rng: random.Random) -> Record:
    """Which plain sentence says what a line of verse says."""
    scene = random_scene(rng)
    scenes = options(scene, rng.randint(2, 4), rng)
    sentences = [plain_sentence(option, rng) for option in scenes]
    return choice(verse(scene, rng), sentences, scenes.index(scene), IN_PLAIN)


TASKS: dict[str, Task] = {
    "copy": copy,
    "dictionary": dictionary,
    "name_option": name_option,
    "same_word": same_word,
    "word_in_verse": match_word(plain_word, verse_word, IN_VERSE),
    "word_in_plain": match_word(verse_word, plain_word, IN_PLAIN),
    "same_words": match_words(verse_word, verse_word),
    "words_in_verse": match_words(plain_word, verse_word),
    "render": render,
    "explain": explain,
    "same_line": same_line,
    "explain_by_option": explain_by_option,
}
