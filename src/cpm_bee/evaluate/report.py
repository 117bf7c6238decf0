"""The figures as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cpm_bee.evaluate.bootstrap import Comparison, Interval, Statistics
from cpm_bee.evaluate.classes import Confusion
from cpm_bee.language import said, width


def shown(value: float, is_share: bool) -> str:
    """A figure as text: shares in percent."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if is_share else f"{value:.2f}"


def shown_interval(interval: Interval, is_share: bool) -> str:
    scale = 100 if is_share else 1
    digits = 1 if is_share else 2
    low, high = (f"{scale * bound:.{digits}f}" for bound in interval)
    return f"{low} {said('to')} {high}"


def sentence(comparison: Comparison) -> str:
    """The difference and what it means: "+4.2 points, 95 % interval 1.1 to 7.3: better"."""
    is_share = comparison.statistics.is_share
    scale, digits = (100, 1) if is_share else (1, 2)
    difference = f"{scale * comparison.difference:+.{digits}f}{said(' points') if is_share else ''}"
    between = shown_interval(comparison.interval, is_share)
    return f"{difference}, {said('95 % interval')} {between}: {said(comparison.verdict)}"


def figure_lines(
    statistics: Sequence[Statistics],
    intervals: Sequence[Interval],
    comparisons: Sequence[Comparison] = (),
) -> list[str]:
    """The table of figures; with `comparisons`, also the baseline and the difference."""
    head = ["figure", "value", "95 % interval", "records"]
    rows = [[said(word) for word in head + (["baseline", "difference"] if comparisons else [])]]
    for i, (own, bounds) in enumerate(zip(statistics, intervals, strict=True)):
        row = [
            said(own.name),
            shown(own.figure, own.is_share),
            shown_interval(bounds, own.is_share),
        ]
        row.append(f"{own.counted:,}")
        if comparisons:
            row.append(shown(comparisons[i].baseline.figure, own.is_share))
            row.append(sentence(comparisons[i]))
        rows.append(row)
    return table(rows)


def class_lines(confusion: Confusion) -> list[str]:
    """Precision, recall and F1 of each class, and the confusion table."""
    rows = [[said(word) for word in ("class", "precision", "recall", "F1", "records")]]
    for own in confusion.figures():
        shares = [shown(v, True) for v in (own.precision, own.recall, own.f1)]
        rows.append([_short(own.name), *shares, f"{own.records:,}"])
    columns = confusion.columns
    counts = [[said("right \\ given"), *map(_short, columns)]]
    for right in confusion.classes:
        cells = (f"{confusion.counts[right, given]:,}" for given in columns)
        counts.append([_short(right), *cells])
    return [*table(rows), "", *table(counts)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns: the first and the last to the left, others to the right.

    A Chinese character is as wide as two letters.
    """
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            cell + " " * (most - width(cell))
            if i == 0 or (i == last and last > 4)
            else " " * (most - width(cell)) + cell
            for i, (cell, most) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _short(text: str, most: int = 20) -> str:
    line = text.replace("\n", " / ")
    return line if len(line) <= most else f"{line[: most - 1]}…"


def joined(blocks: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Blocks of lines under their titles, with an empty line between them."""
    return "\n\n".join(
        "\n".join([said(title), *lines] if title else lines) for title, lines in blocks
    )
