"""Build the vocabulary of the tiny base model, one token per line (docs/format.md §2).

It has, in this order: the special tokens at the beginning of the released vocabulary and `<eod>`;
printable ASCII; punctuation; the usual field names of a record; the 6,763 characters of GB2312;
the most frequent words of jieba's dictionary that consist of those characters only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from output import ArgumentParser, InputError, positive, run_command, write_lines

RESERVED_TOKENS = [
    *("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>"),
    *("<ans>", "<option>", "<eod>"),
]
PUNCTUATION = "，。、；：？！“”‘’（）《》〈〉【】「」『』—…·～￥"
# Keys of records: as single letters they would be a tenth of a short record's tokens.
FIELD_NAMES = ["input", "options", "question", "document", "doc", "prompt"]


def gb2312_characters() -> list[str]:
    """The Chinese characters of GB2312: rows 16 to 87 of its table."""
    characters = []
    for row in range(16, 88):
        for cell in range(1, 95):
            try:
                characters.append(bytes((0xA0 + row, 0xA0 + cell)).decode("gb2312"))
            except UnicodeDecodeError:
                continue  # the last cells of row 55 are empty
    return characters


def frequent_words(characters: set[str], count: int) -> list[str]:
    """The `count` most frequent words of two characters or more, ties in code point order."""
    spec = importlib.util.find_spec("jieba")
    if spec is None or spec.origin is None:
        raise InputError("jieba is not installed: python -m pip install jieba")
    words = []
    with open(Path(spec.origin).parent / "dict.txt", encoding="utf-8") as file:
        for line in file:
            word, frequency, *_ = line.split()
            if len(word) > 1 and characters.issuperset(word):
                words.append((-int(frequency), word))
    return [word for _, word in sorted(words)[:count]]


def build(word_count: int) -> list[str]:
    """All tokens in id order."""
    ascii_characters = [chr(code) for code in range(0x21, 0x7F)]
    chinese = gb2312_characters()
    words = frequent_words(set(chinese), word_count)
    return [*RESERVED_TOKENS, *ascii_characters, *PUNCTUATION, *FIELD_NAMES, *chinese, *words]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="vocabulary file to write")
    parser.add_argument("--words", type=positive, default=1500, help="words taken from jieba")
    arguments = parser.parse_args()
    tokens = build(arguments.words)
    write_lines(arguments.output, tokens)
    print(f"{arguments.output}: {len(tokens)} tokens")


if __name__ == "__main__":
    run_command(main)
