"""Text <-> token ids by greedy longest match over the CPM-Bee vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee.errors import InputError
from cpm_bee.files import refuse_lfs_pointer
from cpm_bee.paths import not_a_file

NEWLINE, SPACE = "</n>", "</_>"
_SPELLED = {NEWLINE: "\n", SPACE: " "}  # entries that stand for another text
REQUIRED = ("<pad>", "<unk>", "<s>", "</s>", "<root>", "<ans>", NEWLINE, SPACE)


class MarkupError(InputError):
    """A `<` in a text is neither escaped nor the beginning of a well-formed special token."""


class Piece(NamedTuple):
    """A part of a text: a special token or a run of unknown characters."""

    text: str
    is_unknown: bool
    is_special: bool


def split_markup(text: str) -> Iterator[tuple[str, bool]]:
    """Split a text into (plain part, False) and (special token, True), without a vocabulary.

    `<<` becomes a literal `<` in a plain part.

    Raises:
        MarkupError: a `<` is inside a special token, or a special token is not closed; positions
            count characters from 0.
    """
    start = 0
    plain = ""
    while (begin := text.find("<", start)) >= 0:
        plain += text[start:begin]
        if text.startswith("<<", begin):
            plain += "<"
            start = begin + 2
            continue
        end = text.find(">", begin)
        inner = text.find("<", begin + 1, end if end >= 0 else len(text))
        if inner >= 0:
            raise MarkupError(
                f"'<' at position {inner} is inside the special token that "
                f"begins at position {begin} (write a literal '<' as '<<', or give --escape)"
            )
        if end < 0:
            raise MarkupError(
                f"the special token that begins with '<' at position {begin} is "
                "not closed by '>' (write a literal '<' as '<<', or give --escape)"
            )
        if plain:
            yield plain, False
            plain = ""
        yield text[begin : end + 1], True
        start = end + 1
    plain += text[start:]
    if plain:
        yield plain, False


def escape(text: str) -> str:
    """Escape a plain text: each `<` becomes `<<`."""
    return text.replace("<", "<<")


def unescape(text: str) -> str:
    """The plain text of an escaped one; special tokens stay as they are."""
    return text.replace("<<", "<")


class ExtensionTable:
    """Assigns ids from the vocabulary size on, in order of first appearance in one record."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.pieces: list[Piece] = []
        self._ids: dict[Piece, int] = {}

    def id_of(self, piece: Piece) -> int:
        token_id = self._ids.get(piece)
        if token_id is None:
            token_id = self._ids[piece] = self._vocab_size + len(self.pieces)
            self.pieces.append(piece)
        return token_id

    def __getitem__(self, token_id: int) -> Piece:
        return self.pieces[token_id - self._vocab_size]

    def __len__(self) -> int:
        return len(self.pieces)


class Tokenizer:
    """The tokenizer of docs/format.md §2.

    Args:
        tokens: the vocabulary in id order.
        source: the origin of the vocabulary, for messages.
    """

    def __init__(self, tokens: Iterable[str], source: str = "vocabulary") -> None:
        self.tokens = list(tokens)
        self.source = source
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = [t for i, t in enumerate(self.tokens) if self.ids[t] != i]
            raise InputError(f"{source}: {len(twice)} tokens appear twice, e.g. {twice[0]!r}")
        missing = [t for t in REQUIRED if t not in self.ids]
        if missing:
            raise InputError(f"{source}: not a CPM-Bee vocabulary, it lacks {' '.join(missing)}")
        self.pad, self.unk = self.ids["<pad>"], self.ids["<unk>"]
        self.bos, self.eos = self.ids["<s>"], self.ids["</s>"]
        self.specials = {
            t: i
            for t, i in self.ids.items()
            if t.startswith("<") and t.endswith(">") and t not in _SPELLED
        }

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a vocabulary file: UTF-8, one token per line; empty lines take no id."""
        path = Path(path)
        if reason := not_a_file(path, "vocabulary file"):
            raise InputError(
                f"{path}: {reason} (bash scripts/fetch_vocab.sh gets that of the released models)"
            )
        refuse_lfs_pointer(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason})") from None
        # Split at "\n" only: some entries are other characters that splitlines() splits at.
        return cls([line for line in text.split("\n") if line], source=str(path))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokens in order; identifies data that depends on the ids."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @cached_property
    def _trie(self) -> dict[str, Any]:
        """A trie of the plain entries, built at the first match.

        A node with several entries below it is a dictionary: next character -> child, and "" ->
        the id of the entry that ends there (or -1). To save memory, a node with a single entry is
        just its id if the entry ends there, else (rest of its text, id).
        """
        root: dict[str, Any] = {}
        for token, token_id in self.ids.items():
            if token not in self.specials:
                _insert(root, _SPELLED.get(token, token), token_id)
        return root

    def match(self, text: str) -> tuple[list[int], list[str]]:
        """Split a plain text into greedy longest matches.

        Returns the ids, with -1 for each run of unknown characters, and the texts of these runs.
        """
        root_get = self._trie.get
        ids: list[int] = []
        runs: list[tuple[int, int]] = []  # begin and end of the unknown runs
        characters = [*text, None]  # None is a key of no node, so it ends every walk
        length = len(text)
        start = 0
        while start < length:
            node: Any = root_get(characters[start])
            best, end = -1, start + 1  # the longest entry found, and where it ends
            if node.__class__ is dict:
                best, position = node[""], end
                while (node := node.get(characters[position])) is not None:
                    position += 1
                    if node.__class__ is dict:
                        if (token_id := node[""]) >= 0:
                            best, end = token_id, position
                        continue
                    if node.__class__ is int:
                        best, end = node, position
                    elif text.startswith(node[0], position):
                        best, end = node[1], position + len(node[0])
                    break
            elif node.__class__ is int:
                best = node
            elif node is not None and text.startswith(node[0], end):
                best, end = node[1], end + len(node[0])
            if best >= 0:
                ids.append(best)
            elif runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
                ids.append(-1)
            start = end
        return ids, [text[begin:end] for begin, end in runs]

    def encode(self, text: str, extension: ExtensionTable | None = None) -> list[int]:
        """The ids of a text; unknown runs and unlisted special tokens get ids from `extension`.

        Raises:
            MarkupError: a special token is malformed.
        """
        extension = ExtensionTable(len(self)) if extension is None else extension
        if "<" not in text:
            return self._encode_plain(text, extension)
        ids: list[int] = []
        for part, is_special in split_markup(text):
            if not is_special:
                ids += self._encode_plain(part, extension)
            elif part in self.specials:
                ids.append(self.specials[part])
            else:
                ids.append(extension.id_of(Piece(part, False, True)))
        return ids

    def _encode_plain(self, text: str, extension: ExtensionTable) -> list[int]:
        ids, unknown = self.match(text)
        if unknown:
            runs = iter(unknown)
            return [extension.id_of(Piece(next(runs), True, False)) if i < 0 else i for i in ids]
        return ids

    def decode(self, ids: Iterable[int], extension: ExtensionTable | None = None) -> str:
        """Join the texts of ids; a literal `<` is written as `<<`."""
        return "".join(self._decode_one(i, extension) for i in ids)

    def _decode_one(self, token_id: int, extension: ExtensionTable | None) -> str:
        if token_id >= len(self):
            if extension is None:
                raise ValueError(f"id {token_id} needs the extension table of its record")
            piece = extension[token_id]
            return piece.text if piece.is_special else escape(piece.text)
        token = self.tokens[token_id]
        if token in _SPELLED:
            return _SPELLED[token]
        return token if token in self.specials else escape(token)

    def category(self, piece: Piece) -> int:
        """The vocabulary id of an extension entry: that of `<unk>`, or of `<name>` for `<name_x>`.

        Raises:
            MarkupError: the vocabulary has no such special token.
        """
        if not piece.is_special:
            return self.unk
        name = "<" + piece.text[1:-1].partition("_")[0] + ">"
        if name not in self.specials:
            raise MarkupError(
                f"special token {piece.text}: {name} is not in the vocabulary {self.source} "
                "(write a literal '<' as '<<', or give --escape)"
            )
        return self.specials[name]


def _insert(node: dict[str, Any], text: str, token_id: int) -> None:
    """Add an entry to a trie (see `Tokenizer._trie`)."""
    for position, character in enumerate(text, start=1):
        rest = text[position:]
        child = node.get(character)
        if child is None:
            node[character] = (rest, token_id) if rest else token_id
            return
        if not isinstance(child, dict):  # a single entry so far: move it one character down
            tail, other = child if isinstance(child, tuple) else ("", child)
            node[character] = child = {"": -1 if tail else other}
            if tail:
                child[tail[0]] = (tail[1:], other) if len(tail) > 1 else other
        if not rest:
            child[""] = token_id
            return
        node = child
