"""The data of the tiny base model: vocabulary, world, raw sample, pre-training records."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from pieces import split_pieces
from support import ROOT, RunScript

sys.path.insert(0, str(ROOT / "scripts" / "tiny_base"))

import build_vocabulary
import make_pretraining_data
import tasks
import world
from lexicon import CONCEPTS, WIDTH, Concept

from cpm_bee.records import validate
from cpm_bee.tokenizer import Tokenizer

QUESTION = "这段话形容了哪句诗的意境？"
ALL_CONCEPTS = [concept for concepts in CONCEPTS.values() for concept in concepts]
BY_VERSE_WORD = {word: concept for concept in ALL_CONCEPTS for word in concept.verse}


class Question(NamedTuple):
    text: str
    options: list[str]
    answer: int


def read_scene(line: str) -> tuple[Concept, ...]:
    """The concepts of a line of verse, read back: words of two characters, the last of three."""
    words = [line[i : i + 2] for i in range(0, len(line) - 3, 2)] + [line[-3:]]
    return tuple(BY_VERSE_WORD[word] for word in words)


@pytest.fixture(scope="module")
def bee_data(tmp_path_factory: pytest.TempPathFactory, run_script: RunScript) -> Path:
    """The committed sample after the tutorial's first step."""
    folder = tmp_path_factory.mktemp("bee_data")
    script = "tutorials/basic_task_finetune/data_reformat.py"
    result = run_script(script, "--input", ROOT / "raw_data", "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def load(path: Path) -> list[Question]:
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        options = record["options"]
        answer = list(options).index(record["<ans>"])
        questions.append(Question(record["input"], list(options.values()), answer))
    return questions


@pytest.fixture(scope="module")
def train(bee_data: Path) -> list[Question]:
    return load(bee_data / "train.jsonl")


@pytest.fixture(scope="module")
def held_out(bee_data: Path) -> list[Question]:
    return load(bee_data / "eval.jsonl")


@pytest.fixture(scope="module")
def pretraining() -> list[tasks.Record]:
    make = make_pretraining_data.Mixture("lines", "test")
    return [make() for _ in range(4000)]


@pytest.fixture(scope="module")
def tiny_vocabulary() -> Tokenizer:
    pytest.importorskip("jieba")
    return Tokenizer(build_vocabulary.build(1500))


# ------------------------------------------------------------------ vocabulary


def test_vocabulary_begins_like_the_released_one(
    tiny_vocabulary: Tokenizer, vocabulary: Tokenizer
) -> None:
    assert tiny_vocabulary.tokens[:11] == vocabulary.tokens[:11]
    assert tiny_vocabulary.tokens[11] == "<eod>"


def test_vocabulary_holds_all_of_gb2312(tiny_vocabulary: Tokenizer) -> None:
    characters = {t for t in tiny_vocabulary.tokens if len(t) == 1 and "一" <= t <= "龥"}
    assert len(characters) == 6763
    assert all(len(character.encode("gb2312")) == 2 for character in characters)


def test_vocabulary_knows_every_text_of_the_world(
    tiny_vocabulary: Tokenizer, pretraining: list[tasks.Record]
) -> None:
    words = [word for concept in ALL_CONCEPTS for word in concept.plain + concept.verse]
    texts = [leaf for record in pretraining for leaf in record.values() if isinstance(leaf, str)]
    for text in [*words, *texts, QUESTION, "input options question document prompt doc"]:
        assert not any(piece.is_unknown for piece in split_pieces(tiny_vocabulary, text)), text


def test_vocabulary_script_writes_one_token_a_line(tmp_path: Path, run_script: RunScript) -> None:
    pytest.importorskip("jieba")
    path = tmp_path / "vocab.txt"
    script = "scripts/tiny_base/build_vocabulary.py"
    result = run_script(script, "--output", path, "--words", 20)
    assert result.returncode == 0, result.stderr
    assert Tokenizer.load(path).tokens == build_vocabulary.build(20)
    assert path.read_text(encoding="utf-8").splitlines()[-20] == "一个"


# ------------------------------------------------------------------ the world


def test_every_wording_means_one_concept() -> None:
    for kind in ("plain", "verse"):
        words = [word for concept in ALL_CONCEPTS for word in getattr(concept, kind)]
        assert [word for word, count in Counter(words).items() if count > 1] == []


def test_verse_wordings_fit_the_metre() -> None:
    for concept in ALL_CONCEPTS:
        assert {len(word) for word in concept.verse} == {WIDTH[concept.slot]}


def test_a_fair_share_of_the_scenes_is_held_out() -> None:
    rng = random.Random(0)
    shape = next(iter(world.SHAPES))
    scenes = [tuple(rng.choice(CONCEPTS[slot]) for slot in shape) for _ in range(4000)]
    share = sum(map(world.is_held_out, scenes)) / len(scenes)
    assert share == pytest.approx(1 / world.HELD_OUT_SHARE, abs=0.04)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("held_out", [False, True])
def test_options_are_of_one_side_and_differ(count: int, held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(100):
        scene = world.random_scene(rng, held_out)
        scenes = world.options(scene, count, rng)
        assert scene in scenes
        assert len(set(scenes)) == count
        assert {world.is_held_out(s) for s in scenes} == {held_out}


# ------------------------------------------------------------------ the raw sample


def test_the_committed_sample_is_what_the_script_makes(
    tmp_path: Path, run_script: RunScript
) -> None:
    result = run_script("scripts/tiny_base/make_raw_data.py", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "raw_data" / name).read_bytes()


def test_sizes(train: list[Question], held_out: list[Question]) -> None:
    assert (len(train), len(held_out)) == (3000, 400)
    assert {len(q.options) for q in train + held_out} == {4}


def test_exactly_the_right_option_renders_the_text(
    train: list[Question], held_out: list[Question]
) -> None:
    for q in train + held_out:
        told = [
            all(any(word in q.text for word in concept.plain) for concept in read_scene(option))
            for option in q.options
        ]
        assert told == [i == q.answer for i in range(len(q.options))], q


def test_train_and_eval_share_no_text_and_no_scene(
    train: list[Question], held_out: list[Question]
) -> None:
    assert not {q.text for q in train} & {q.text for q in held_out}
    scenes = [
        {read_scene(option) for q in questions for option in q.options}
        for questions in (train, held_out)
    ]
    assert not scenes[0] & scenes[1]


def test_the_answer_stands_anywhere(train: list[Question], held_out: list[Question]) -> None:
    counts = Counter(q.answer for q in train)
    assert all(abs(counts[i] - 750) < 4 * (3000 * 3 / 16) ** 0.5 for i in range(4))
    counts = Counter(q.answer for q in held_out)
    assert all(abs(counts[i] - 100) < 4 * (400 * 3 / 16) ** 0.5 for i in range(4))


def common(a: str, b: str) -> int:
    return sum((Counter(a) & Counter(b)).values())


def accuracy(questions: list[Question], score: Callable[[Question, int], float]) -> float:
    """Of choosing the option with the best score, ties counted in parts."""
    total = 0.0
    for q in questions:
        scores = [score(q, i) for i in range(len(q.options))]
        total += (scores[q.answer] == max(scores)) / scores.count(max(scores))
    return total / len(questions)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_answer_is_not_the_option_most_or_least_like_the_others(
    train: list[Question], held_out: list[Question], sign: int
) -> None:
    def likeness(q: Question, i: int) -> float:
        scene = read_scene(q.options[i])
        others = [read_scene(o) for o in q.options]
        by_concept = sum(a == b for other in others for a, b in zip(scene, other, strict=True))
        return sign * (by_concept + 0.01 * sum(common(q.options[i], o) for o in q.options))

    assert accuracy(train + held_out, likeness) == pytest.approx(0.25, abs=0.04)


def test_words_that_were_right_in_training_do_not_give_the_answer_away(
    train: list[Question], held_out: list[Question]
) -> None:
    right: dict[Concept, int] = defaultdict(int)
    seen: dict[Concept, int] = defaultdict(int)
    for q in train:
        for i, option in enumerate(q.options):
            for concept in read_scene(option):
                seen[concept] += 1
                right[concept] += i == q.answer

    def score(q: Question, i: int) -> float:
        return sum((right[c] + 1) / (seen[c] + 4) for c in read_scene(q.options[i]))

    assert accuracy(held_out, score) < 0.35


def test_a_rendering_keeps_a_character_of_the_plain_words() -> None:
    """As real ones do; it is what tuning on a small base can build on."""
    for concepts in CONCEPTS.values():
        for concept in concepts:
            for plain, poetic in itertools.product(concept.plain, concept.verse):
                assert common(plain, poetic) > 0


# ------------------------------------------------------------------ pre-training


def leaves(record: tasks.Record) -> list[str]:
    texts = []
    for value in record.values():
        texts += list(value.values()) if isinstance(value, dict) else [value]
    return texts


def test_pretraining_records_are_valid(pretraining: list[tasks.Record]) -> None:
    assert [problem for record in pretraining for problem in validate(record)] == []


def test_every_task_takes_part() -> None:
    stages = make_pretraining_data.STAGES.values()
    assert {name for stage in stages for name in stage} == tasks.TASKS.keys()


def test_pretraining_shows_no_scene_of_the_evaluation_set(
    pretraining: list[tasks.Record], held_out: list[Question]
) -> None:
    texts = {text for record in pretraining for text in leaves(record)}
    texts |= {key for record in pretraining if isinstance(record["<ans>"], dict)
              for key in record["<ans>"]}  # fmt: skip
    assert not texts & {q.text for q in held_out}
    lines = [text for text in texts if len(text) in (5, 7) and text[-3:] in BY_VERSE_WORD]
    lines = [line for line in lines if line[:2] in BY_VERSE_WORD]
    assert len(lines) > 500
    assert not [line for line in lines if world.is_held_out(read_scene(line))]


def test_pretraining_leaves_the_tutorials_task_to_tuning(pretraining: list[tasks.Record]) -> None:
    """Neither its question nor a choice of verse for a plain sentence."""
    for record in pretraining:
        assert record.get("question") != QUESTION
        numbered = re.fullmatch("第.项是哪一项？", str(record.get("question")))
        if not numbered and str(record.get("input", "")).endswith("。"):
            pytest.fail(f"chooses for a plain sentence: {record}")


def test_the_right_option_is_the_answer(pretraining: list[tasks.Record]) -> None:
    checked: Counter[str] = Counter()
    for record in pretraining:
        question = str(record.get("question"))
        options = record.get("options")
        if not isinstance(options, dict) or question == tasks.WRITE_OPTION:
            continue
        if question.startswith("第"):
            assert record["<ans>"] == f"<option_{'一二三四'.index(question[1])}>"
            checked[question[2:]] += 1
            continue
        answer = record["<ans>"]
        asked = answer if isinstance(answer, dict) else {str(record["input"]): answer}
        for text, name in asked.items():
            fits = [option for option, offered in options.items() if text == offered]
            assert fits == [name], record
            checked[question] += 1
    assert checked.keys() == {"None", tasks.EQUAL, "项是哪一项？"}
    assert min(checked.values()) > 100


def test_pretraining_data_is_reproducible(tmp_path: Path, run_script: RunScript) -> None:
    for place in ("a", "b"):
        script = "scripts/tiny_base/make_pretraining_data.py"
        arguments = ("--output", tmp_path / place, "--stage", "lines", "--train", 300, "--eval", 30)
        result = run_script(script, *arguments)
        assert result.returncode == 0, result.stderr
    for name, count in (("train.jsonl", 300), ("eval.jsonl", 30)):
        text = (tmp_path / "a" / name).read_bytes()
        assert text == (tmp_path / "b" / name).read_bytes()
        assert len(text.splitlines()) == count
