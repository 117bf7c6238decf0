"""The language of messages, help and results: English or Chinese.

`--lang` decides; without it, the environment (`LC_ALL`, `LC_MESSAGES`, `LANG`, the first that is
set). It is known before the command line is parsed, since that can fail.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping

AUTO, ENGLISH, CHINESE = "auto", "en", "zh"
LANGUAGES = (AUTO, ENGLISH, CHINESE)
LANG_HELP = "language of messages, help and results; `auto` takes it from the locale"
LANG_HELP_CHINESE = "消息、帮助与结果的语言；`auto` 表示取自系统 locale"

_chosen: str | None = None


def of_environment(environment: Mapping[str, str]) -> str:
    """The language of a locale, such as zh_CN.UTF-8; English unless it is Chinese."""
    names = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    locale = next(filter(None, names), "")
    return CHINESE if locale.lower().startswith("zh") else ENGLISH


def choose(name: str | None) -> None:
    """Take a language, `en` or `zh`, for all that this process prints; else that of the locale."""
    global _chosen
    _chosen = name if name in (ENGLISH, CHINESE) else None


def current() -> str:
    """`en` or `zh`."""
    return _chosen or of_environment(os.environ)


def is_chinese() -> bool:
    return current() == CHINESE


def said(text: str) -> str:
    """A text, written in English, in the user's language."""
    if not is_chinese():
        return text
    from cpm_bee.error_codes import translate  # loads the tables

    return translate(text, lines=True)


def width(text: str) -> int:
    """The columns of a terminal that a text takes: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns; Chinese is broken anywhere but before punctuation."""
    lines, line = [], ""
    words = re.findall(r"[!-~]+[，。；：、）！？”]*|.[，。；：、）！？”]*", " ".join(text.split()))
    for word in words:
        if line and width(line + word.rstrip()) > columns:
            lines.append(line.rstrip())
            line = ""
        line += word if line or word != " " else ""
    return [*lines, line.rstrip()] if line or not lines else lines
