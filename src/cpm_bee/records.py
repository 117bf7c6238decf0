"""A record: a nested dictionary of strings with the answer under `<ans>`.

`validate` makes all checks that need no vocabulary: the structure of the tree; special tokens that
are malformed or reserved for the model; special tokens in an answer that the rest of its record
does not contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, TypeAlias

from cpm_bee.errors import shown
from cpm_bee.tokenizer import MarkupError, split_markup

ANSWER = "<ans>"
# What an answered record may have besides: whether its answer was cut off, all its answers, and the
# probabilities of its options. The vocabulary has no such tokens, so no field has these names.
CUT, CANDIDATES, CHOICES = "<cut>", "<candidates>", "<choices>"
MARKS = (CUT, CANDIDATES, CHOICES)
Tree: TypeAlias = "str | dict[str, Tree]"
Record: TypeAlias = dict[str, Tree]

# More than any real record has. A limit is needed because reading and walking a tree recurse.
MAX_NESTING = 64
# Per record: a line of a megabyte can have a hundred thousand.
_MAX_PROBLEMS = 100
_SURROGATE = re.compile("[\ud800-\udfff]")
# Tokens that structure the stream, by name (the part before the first "_"). In a text they would
# end an answer, or be mistaken for an unknown word.
CONTROL_NAMES = frozenset({"pad", "unk", "s", "/s", "root", "sep", "ans", "/n", "/"})
# Special tokens that texts may contain; `escape_texts` leaves them unchanged.
_KEPT_BY_ESCAPE = re.compile(r"<(?:mask|option)(?:_[0-9]+)?>")
_OPTION = re.compile("<option_[0-9]+>")
_LESS_THAN = re.compile(r"<(?:[^<>]*>)?")  # a `<`, or all of its special token if there is one
_LITERAL = "write a literal '<' as '<<', or let --escape do it for all texts"


def without_marks(record: Any) -> Any:
    """Returns an answered record without its marks; anything else as it is."""
    if isinstance(record, dict) and any(mark in record for mark in MARKS):
        return {key: value for key, value in record.items() if key not in MARKS}
    return record


def has_answer(answer: Tree) -> bool:
    """Whether an answer contains any text; `""` means that it is not known."""
    return any(map(has_answer, answer.values())) if isinstance(answer, dict) else answer != ""


def options_of(record: Record) -> dict[str, str]:
    """The options of a record, by their special token; empty if it has none."""
    for key, value in record.items():
        if key != ANSWER:
            for node in _dictionaries(value):
                texts = {k: v for k, v in node.items() if isinstance(v, str)}
                if len(texts) == len(node) > 1 and all(map(_OPTION.fullmatch, node)):
                    return texts
    return {}


def _dictionaries(node: Tree) -> Iterator[dict[str, Tree]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _dictionaries(value)


def escape_texts(record: Any) -> Any:
    """Escape the texts of a record: each literal `<` becomes `<<`.

    `<mask_0>`, `<option_3>` and special tokens that are keys of the record remain special tokens.
    Keys are not changed. A value that is not a record is returned unchanged, for `validate`.
    """
    if not isinstance(record, dict) or not _collect(record, [], 1):
        return record
    kept = {key for key in _keys(record) if key[:1] == "<"}

    def doubled(match: re.Match[str]) -> str:
        token = match[0]
        return token if token in kept or _KEPT_BY_ESCAPE.fullmatch(token) else f"<{token}"

    def escaped(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: escaped(value) for key, value in node.items()}
        return _LESS_THAN.sub(doubled, node) if isinstance(node, str) else node

    return escaped(record)


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key != ANSWER:
                yield key
            yield from _keys(value)


def validate(record: Any) -> list[str]:
    """Returns the reasons why a value is not a valid record; empty if it is one.

    Checks the structure (a dictionary of dictionaries and strings), that `<ans>` is present, that
    special tokens are well formed and not control tokens, and that an answer contains none that
    the rest of the record lacks (docs/format.md §1, §2). Does not check that the vocabulary has
    their names.
    """
    if _is_valid(record):
        return []
    return _problems(record)


def _problems(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return [f"a record is a JSON object, this is {_kind(record)}"]
    problems = list(islice(_tree_problems(record, "", 1), _MAX_PROBLEMS))
    if ANSWER not in record:
        problems.append(f'there is no "{ANSWER}" (use "" where the answer is not known)')
    elif not _has_leaf(record[ANSWER]):
        problems.append(f'"{ANSWER}" holds no text')
    return problems or _answer_problems(record)


def _answer_problems(record: Record) -> list[str]:
    """Problems with special tokens in the answer that the rest of the record does not contain.

    Generation can write only those that it does contain.
    """
    answered = _specials(record[ANSWER], leaves_only=True)
    wanted = {token for token in answered if "_" in token}
    if not wanted:
        return []
    context = {key: value for key, value in record.items() if key != ANSWER}
    known = _specials(context) | _specials(record[ANSWER], keys_only=True)
    return [
        f"{token} in the answer does not appear in the rest of the record, so it can never be "
        f"generated ({_LITERAL})"
        for token in sorted(wanted - known)
    ]


def _specials(node: Tree, *, leaves_only: bool = False, keys_only: bool = False) -> set[str]:
    if isinstance(node, str):
        return set() if keys_only else set(special_tokens(node))
    found: set[str] = set()
    for key, value in node.items():
        if not leaves_only:
            found.update(special_tokens(key))
        found |= _specials(value, leaves_only=leaves_only, keys_only=keys_only)
    return found


def special_tokens(text: str) -> tuple[str, ...]:
    """The special tokens of a well-formed text."""
    return _special_tokens(text) if "<" in text else ()


@lru_cache(maxsize=256)
def _special_tokens(text: str) -> tuple[str, ...]:
    return tuple(part for part, is_special in split_markup(text) if is_special)


def _is_valid(record: Any) -> bool:
    """A quick check; true only if the record has no problems."""
    texts: list[str] = []
    if not isinstance(record, dict) or not _collect(record, texts, 1):
        return False
    if ANSWER not in record or not _has_leaf(record[ANSWER]):
        return False
    try:
        "".join(texts).encode()  # refuses surrogates
    except (TypeError, UnicodeEncodeError):
        return False
    marked = [text for text in texts if "<" in text]
    if not all(map(_is_well_formed, marked)):
        return False
    return not marked or not _answer_problems(record)


def _collect(node: dict, texts: list[str], depth: int) -> bool:
    """Collect keys and leaves of any type; returns false if the tree is too deep."""
    for key, value in node.items():
        if depth > 1 or key != ANSWER:
            texts.append(key)
        if value.__class__ is not dict:
            texts.append(value)
        elif depth == MAX_NESTING or not _collect(value, texts, depth + 1):
            return False
    return True


@lru_cache(maxsize=256)
def _is_well_formed(text: str) -> bool:
    return not list(_text_problems(text, ""))


def _tree_problems(node: dict, path: str, depth: int) -> Iterator[str]:
    for key, value in node.items():
        where = f"{path}/{_short(key)}"
        if depth > 1 or key != ANSWER:
            yield from _text_problems(key, f"key {where}")
        if isinstance(value, str):
            yield from _text_problems(value, f"value of {where}")
        elif not isinstance(value, dict):
            yield f"value of {where}: expected text or an object, this is {_kind(value)}"
        elif depth == MAX_NESTING:
            yield f"value of {where}: nested more than {MAX_NESTING} deep"
        else:
            yield from _tree_problems(value, where, depth + 1)


def _has_leaf(node: Any) -> bool:
    # Anything but a dictionary is either text or a problem that is reported separately. This is a
    # loop because a tree may be of any depth here.
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            return True
        nodes.extend(node.values())
    return False


def _text_problems(text: Any, where: str) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{where}: expected text, this is {_kind(text)}"
        return
    if "<" in text:
        try:
            for part, is_special in split_markup(text):
                if is_special and part[1:-1].partition("_")[0] in CONTROL_NAMES:
                    yield f"{where}: {part} is a control token of the model ({_LITERAL})"
        except MarkupError as error:
            yield f"{where}: {error}"
    if _SURROGATE.search(text):
        yield f"{where}: contains half of a surrogate pair, which is not text"


def _short(key: Any) -> str:
    """A key as part of a message's path."""
    if not isinstance(key, str):
        return shown(key)
    return key if len(key) <= 40 else f"{key[:40]}..."


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
