"""Pieces of HTML in two languages. All texts that come from elsewhere go through `escape`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from cpm_bee.report.facts import Text


def escape(text: object) -> str:
    """A text as HTML that shows it, in an element or in a quoted attribute.

    Half of a surrogate pair, which no file can hold, becomes a question mark.
    """
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def both(english: str, chinese: str) -> str:
    """A text of our own in both languages, as HTML; the page shows one of them."""
    return f'<span class="en" lang="en">{english}</span><span class="zh" lang="zh">{chinese}</span>'


def escaped(text: Text) -> str:
    return both(escape(text.english), escape(text.chinese))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML, which scrolls sideways where it is too wide.

    Args:
        kind: its class; in the rows of a table of "figures" all but the first cell are numbers.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    # Focusable, so that it can be scrolled with the keyboard.
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}">{top}\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>\n{content}</section>\n'
