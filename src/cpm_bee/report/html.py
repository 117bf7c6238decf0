"""Pieces of the report's HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
