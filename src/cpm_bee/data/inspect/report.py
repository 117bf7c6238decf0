"""The figures of data as text for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from cpm_bee.data.inspect.figures import Figures, Overlap, Places
from cpm_bee.data.inspect.tokens import Segment
from cpm_bee.language import said, width

_BINS, _WIDTH = 16, 40
_SHOWN = 12  # characters and labels
# ANSI: foreground colours of segments in turn; bold and reversed for targets, red for unknown.
_COLORS = (36, 33, 35, 32, 34)


def histogram(lengths: np.ndarray, max_length: int) -> list[tuple[int, int, int]]:
    """Bins of equal width as (first length, last length, records); one ends at `max_length`."""
    shortest, longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (1, 1)
    last = min(longest, max_length)
    width = max(1, -(-(last - shortest + 1) // _BINS))
    # What is longer than a row is one bin.
    edges = [*range(shortest, last + 1, width)]
    bins = []
    for begin in edges:
        end = min(begin + width - 1, last)
        bins.append((begin, end, int(((lengths >= begin) & (lengths <= end)).sum())))
    if longest > max_length:
        bins.append((max_length + 1, longest, int((lengths > max_length).sum())))
    return bins


def lines_of(figures: Figures) -> list[tuple[str, str]]:
    """(what, value) of each figure."""
    lengths = figures.lengths
    middle, high, longest = (
        np.percentile(lengths, [50, 95, 100]).astype(int).tolist() if len(lengths) else (0, 0, 0)
    )
    found = [
        ("records", f"{figures.records:,}"),
        ("tokens", f"{int(lengths.sum()):,}, of them {int(figures.num_targets.sum()):,} targets"),
        ("length", f"median {middle:,}, 95% up to {high:,}, longest {longest:,}"),
        (f"longer than {figures.max_length:,}", _places(figures.too_long, figures)),
        (
            "rows of an epoch",
            f"{figures.rows:,}, filled to {figures.fill:.1%}" if figures.rows else "none",
        ),
        ("without an answer", _places(figures.unanswered, figures)),
        ("answer cannot be generated", _places(figures.unwritable, figures)),
        ("characters not in the vocabulary", missing_text(figures)),
        ("same as an earlier record", _places(figures.same, figures)),
        ("same context, another answer", _places(figures.contradicting, figures)),
        ("near-duplicate of an earlier record", _places(figures.near, figures)),
    ]
    return found


def missing_text(figures: Figures) -> str:
    if not figures.missing:
        return "none"
    shown = " ".join(f"{c!r} ({n:,})" for c, n in figures.missing.most_common(_SHOWN))
    more = len(figures.missing) - _SHOWN
    others = f" and {more:,} more" if more > 0 else ""
    share = f"{figures.with_missing:,} records ({figures.share(figures.with_missing):.1%})"
    return f"{len(figures.missing):,} in {share}: {shown}{others}"


def _places(places: Places, figures: Figures) -> str:
    if not places.count:
        return "none"
    more = ", ..." if places.count > len(places.first) else ""
    # A set that is one file need not be named again.
    first = ", ".join(where.removeprefix(figures.name).lstrip("/:") for where in places.first)
    return f"{places.count:,} ({figures.share(places.count):.1%}), at {first}{more}"


def overlap_lines(overlap: Overlap, evaluation: Figures) -> list[tuple[str, str]]:
    return [
        ("same context as a training record", _places(overlap.same, evaluation)),
        ("near-duplicate of a training record", _places(overlap.near, evaluation)),
    ]


def bars(counts: Sequence[tuple[str, int]], total: int) -> list[str]:
    """A line for each count, with a bar."""
    most = max((count for _, count in counts), default=0)
    width = max((len(name) for name, _ in counts), default=0)
    lines = []
    for name, count in counts:
        eighths = round(8 * _WIDTH * count / most) if most else 0
        bar = "█" * (eighths // 8) + ("" if eighths % 8 == 0 else " ▏▎▍▌▋▊▉"[eighths % 8])
        lines.append(f"  {name:>{width}} {bar or ' '} {count:,} ({count / total:.1%})")
    return lines


def text_report(sets: Sequence[Figures], overlap: Overlap | None) -> str:
    lines: list[str] = []
    for figures in sets:
        lines += [figures.name, *_table(lines_of(figures)), "", said("  lengths in tokens")]
        bins = histogram(figures.lengths, figures.max_length)
        lines += bars([(f"{a}–{b}", count) for a, b, count in bins], max(1, figures.records))
        for title, counts in balances(figures):
            lines += ["", said(f"  {title}"), *bars(counts, sum(c for _, c in counts))]
        lines.append("")
    if overlap is not None:
        lines += [said(f"{sets[1].name} compared with {sets[0].name}")]
        lines += [*_table(overlap_lines(overlap, sets[1])), ""]
    return "\n".join(lines)


def balances(figures: Figures) -> list[tuple[str, list[tuple[str, int]]]]:
    """The distributions of answers that are worth a look."""
    found = []
    if figures.labels:
        found.append(("answers", figures.labels.most_common()))
    if figures.positions:
        found.append(("the option that is the answer", sorted(figures.positions.items())))
    return found


def _table(rows: list[tuple[str, str]]) -> list[str]:
    rows = [(said(name), said(value)) for name, value in rows]
    most = max(width(name) for name, _ in rows)
    return [f"  {name}{' ' * (most - width(name))}  {value}" for name, value in rows]


def use_color() -> bool:
    """Whether standard output is a terminal that may have colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show_record(where: str, segments: Sequence[Segment], *, color: bool) -> str:
    """A record as the model sees it: a line for each segment, targets marked with `>`.

    Tokens are separated by `|`. With colours, targets are reversed and unknown words red.
    """
    lines = [said(f"{where}: {sum(len(s.tokens) for s in segments)} tokens")]
    for number, segment in enumerate(segments):
        mark = ">" if segment.is_target else " "
        parts = []
        for token in segment.tokens:
            text = token.text.replace("\n", "\\n")
            if color:
                code = "31;1" if token.kind == "unknown" else str(_COLORS[number % len(_COLORS)])
                code = f"{code};2" if token.kind == "special" else code
                code = f"{code};7" if segment.is_target else code
                text = f"\x1b[{code}m{text}\x1b[0m"
            parts.append(text)
        lines.append(f"{mark} {number:>3} {'  ' * segment.depth}{'|'.join(parts)}")
    return "\n".join(lines)
