"""What columns and keys are called: by us, LLaMA-Factory, ms-swift and published data sets.

A *role* is what a column is for the record. The names of a role are in the order of preference:
where a row has two of them, the first is taken. Names are compared without case and outer spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = (
    *("instruction", "input", "output", "history", "system", "messages", "tools"),
    *("context", "question", "answer", "choices", "text", "text2", "label"),
)
# Instructions: the columns of LLaMA-Factory's alpaca format, and the keys of ms-swift's
# ResponsePreprocessor. A name in two roles is the first role's, unless that has a better one.
NAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "prompt", "query", "problem", "question", "指令"),
    "input": ("input", "query", "输入"),
    "output": (
        *("output", "response", "completion", "targets", "target", "solution", "answer"),
        *("answers", "answer_key", "text", "content", "输出"),
    ),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
    "tools": ("tools",),
    "context": (
        *("context", "passage", "translation", "document", "paragraph", "article", "input"),
        *("content", "text", "文章", "上下文", "材料"),
    ),
    "question": ("question", "q", "问题", "题目"),
    "answer": (
        *("answer", "answers", "answerkey", "answer_key", "answer_idx", "correct", "target"),
        *("label", "a", "答案", "回答"),
    ),
    "choices": ("choices", "choice", "options", "candidates", "选项"),
    "text": (
        *("text", "sentence", "sentence1", "review", "content", "comment", "text_a", "premise"),
        *("input", "文本", "内容", "评论", "句子"),
    ),
    "text2": ("sentence2", "text_b", "text2", "hypothesis"),
    "label": (
        *("label_desc", "label_name", "label", "labels", "category", "class", "sentiment"),
        *("标签", "类别", "分类"),
    ),
}
# What LLaMA-Factory's dataset_info.json calls the roles.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    **{name: name for name in ("history", "system", "messages", "tools")},
}

_CACHED = 1000  # sets of keys; most files have one


def normal(name: object) -> str:
    return str(name).strip().casefold()


class Columns:
    """The keys of the roles in the rows of a file.

    Args:
        given: role -> key, from `--columns` or `dataset_info.json`; these are not guessed.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self.given = dict(given or {})
        self._found: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, str]] = {}

    def find(self, row: Mapping[str, Any], roles: tuple[str, ...]) -> dict[str, str]:
        """The key of each role in a row, as far as it has one; no key is taken for two roles."""
        cached = self._found.get((tuple(row), roles))
        if cached is None:
            cached = self._find(row, roles)
            if len(self._found) < _CACHED:
                self._found[tuple(row), roles] = cached
        return cached

    def _find(self, row: Mapping[str, Any], roles: tuple[str, ...]) -> dict[str, str]:
        keys = {normal(key): key for key in row}
        found: dict[str, str] = {}
        for role in roles:
            if role in self.given:
                key = keys.get(normal(self.given[role]))
                if key is not None:
                    found[role] = key
        taken = set(found.values()) | {
            keys[normal(key)]
            for role, key in self.given.items()
            if role not in found and normal(key) in keys
        }
        for role in roles:
            if role not in self.given:
                names = (keys[name] for name in NAMES[role] if name in keys)
                key = next((key for key in names if key not in taken), None)
                if key is not None:
                    found[role] = key
                    taken.add(key)
        return found
