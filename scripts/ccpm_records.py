"""Makes what ccpm_from_scratch.sh trains on, from records of CCPM: vocabulary, config, two stages.

A small model learns the task late or never if it has nothing but the task: an answer is one token,
and its choice needs a comparison of characters that a random model cannot make. So there are
stages, all made of the training records alone:

  words    which option equals this piece of a verse; several are asked for at once
  choices  the task, with the options in new orders; and which of six verses renders which of six
           sentences, where each token of the answers teaches which characters go together

The vocabulary has single characters, so that a character is the same token in both texts.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "tiny_base"))

from build_vocabulary import FIELD_NAMES, PUNCTUATION, RESERVED_TOKENS
from output import ArgumentParser, InputError, positive, run_command, write_lines

ANSWER, QUESTION = "<ans>", "question"
CONFIG = {
    **{"dim_model": 128, "num_heads": 4, "dim_head": 32, "dim_ff": 256, "num_layers": 3},
    **{"dropout_p": 0.0, "half": True},
}
WORDS = 600  # records of the first stage
MATCHED = 6  # pairs in a record of "which renders which"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file that data_reformat.py made, without their question.

    The question is the same in all of them, and a sixth of their tokens.
    """
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for record in records:
        record.pop(QUESTION, None)
    answered = [record for record in records if record[ANSWER]]
    if not answered:
        raise InputError(f"{path}: no record has an answer")
    return answered


def right_option(record: dict[str, Any]) -> str:
    return record["options"][record[ANSWER]]


def vocabulary(records: list[dict[str, Any]]) -> list[str]:
    """Reserved tokens, ASCII, field names, and each character that occurs twice, frequent first."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["input"])
        for option in record["options"].values():
            counts.update(option)
    ascii_characters = [chr(code) for code in range(0x21, 0x7F)]
    tokens = [*RESERVED_TOKENS, *ascii_characters, *PUNCTUATION, *FIELD_NAMES]
    known = {*tokens, *(c for c in counts if not c.strip())}
    return tokens + [c for c, count in counts.most_common() if count > 1 and c not in known]


def options_of(texts: list[str], order: list[int]) -> dict[str, str]:
    return {f"<option_{i}>": texts[j] for i, j in enumerate(order)}


class Stages:
    """The records of each stage; the same seed gives the same ones."""

    def __init__(self, records: list[dict[str, Any]], seed: int) -> None:
        self._records = records
        # A piece with a special token's `<` would be cut.
        self._verses = [o for r in records for o in r["options"].values() if "<" not in o]
        self._rng = random.Random(seed)

    def words(self, count: int) -> Iterator[dict[str, Any]]:
        for _ in range(count):
            task = self._rng.choice((self._name_option, self._same_word, self._same_words))
            yield task()

    def choices(self, epochs: int) -> Iterator[dict[str, Any]]:
        for _ in range(epochs):
            records = [self._shuffled(record) for record in self._records]
            order = self._rng.sample(self._records, len(self._records))
            # With few records, or equal texts, fewer of them.
            groups = [order[i : i + MATCHED] for i in range(0, len(order), MATCHED)]
            records += [self._matched(g) for g in groups if len({r["input"] for r in g}) == len(g)]
            self._rng.shuffle(records)
            yield from records

    def _pieces(self, least: int, most: int) -> list[str]:
        """Distinct pieces of verses, of one to three characters."""
        pieces: dict[str, None] = {}
        count = self._rng.randint(least, most)
        while len(pieces) < count:
            verse = self._rng.choice(self._verses)
            size = self._rng.randint(1, 3)
            start = self._rng.randrange(max(len(verse) - size + 1, 1))
            pieces[verse[start : start + size]] = None
        return list(pieces)

    def _name_option(self) -> dict[str, Any]:
        """Write the option that the input names."""
        pieces = self._pieces(2, 4)
        right = self._rng.randrange(len(pieces))
        options = options_of(pieces, list(range(len(pieces))))
        return {"input": f"<option_{right}>", "options": options, ANSWER: pieces[right]}

    def _same_word(self) -> dict[str, Any]:
        """Choose the option that equals the input."""
        pieces = self._pieces(2, 4)
        right = self._rng.randrange(len(pieces))
        options = options_of(pieces, list(range(len(pieces))))
        return {"input": pieces[right], "options": options, ANSWER: f"<option_{right}>"}

    def _same_words(self) -> dict[str, Any]:
        """Choose the options of several pieces; each of these is a key of the answer."""
        pieces = self._pieces(3, 8)
        asked_for = self._rng.sample(range(len(pieces)), len(pieces) // 2)
        options = options_of(pieces, list(range(len(pieces))))
        return {"options": options, ANSWER: {pieces[i]: f"<option_{i}>" for i in asked_for}}

    def _shuffled(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with its options in another order."""
        names = list(record["options"])
        order = self._rng.sample(range(len(names)), len(names))
        options = options_of(list(record["options"].values()), order)
        right = order.index(names.index(record[ANSWER]))
        return {"input": record["input"], "options": options, ANSWER: f"<option_{right}>"}

    def _matched(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Choose for each sentence, a key of the answer, the verse that renders it."""
        order = self._rng.sample(range(len(records)), len(records))
        options = options_of([right_option(record) for record in records], order)
        answers = {records[j]["input"]: f"<option_{i}>" for i, j in enumerate(order)}
        return {"options": options, ANSWER: answers}


def write_records(path: Path, records: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="training records")
    parser.add_argument("--eval", type=Path, required=True, help="evaluation records")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--epochs", type=positive, default=6, help="orders of the options")
    parser.add_argument("--words", type=positive, default=60_000, help="records of that stage")
    parser.add_argument("--held-out", type=positive, default=300, help="records to steer by")
    parser.add_argument("--seed", type=positive, default=1)
    arguments = parser.parse_args()
    train, evaluation = read(arguments.train), read(arguments.eval)
    # Which weights are the best is found on training records that are kept back: the evaluation
    # records serve for the last figure alone.
    held_out = min(arguments.held_out, len(train) // 10 + 1)
    kept_back, train = train[:held_out], train[held_out:]
    tokens = vocabulary(train)
    stages = Stages(train, arguments.seed)
    output = arguments.output
    for stage in ("words", "choices"):
        (output / stage).mkdir(parents=True, exist_ok=True)
    write_lines(output / "vocab.txt", tokens)
    write_lines(output / "config.json", [json.dumps({"vocab_size": len(tokens), **CONFIG})])
    write_records(output / "words" / "train.jsonl", stages.words(arguments.words))
    write_records(output / "choices" / "train.jsonl", stages.choices(arguments.epochs))
    write_records(output / "words" / "eval.jsonl", stages.words(held_out))
    write_records(output / "choices" / "eval.jsonl", kept_back)
    write_records(output / "evaluation.jsonl", evaluation)
    print(f"{output}: {len(tokens):,} tokens, {len(train):,} training records", end=" ")
    print(f"({held_out:,} kept back), {len(evaluation):,} evaluation records")


if __name__ == "__main__":
    run_command(main)
