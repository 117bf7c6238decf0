"""The figures of data in words, in both languages, and as text for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from cpm_bee.data.inspect.figures import Figures, Overlap, Places
from cpm_bee.data.inspect.tokens import Segment
from cpm_bee.html_pages import Text
from cpm_bee.language import is_chinese, said, width

_BINS, _WIDTH = 16, 40
_SHOWN = 12  # characters and labels
_NONE = Text("none", "无")
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


def lines_of(figures: Figures) -> list[tuple[Text, Text]]:
    """(what, value) of each figure."""
    lengths = figures.lengths
    middle, high, longest = (
        np.percentile(lengths, [50, 95, 100]).astype(int).tolist() if len(lengths) else (0, 0, 0)
    )
    records, tokens = f"{figures.records:,}", f"{int(lengths.sum()):,}"
    targets, limit = f"{int(figures.num_targets.sum()):,}", f"{figures.max_length:,}"
    rows, fill = f"{figures.rows:,}", f"{figures.fill:.1%}"
    return [
        (Text("records", "记录数"), Text(records, records)),
        (
            Text("tokens", "token 数"),
            Text(f"{tokens}, of them {targets} targets", f"{tokens}，其中要预测的 {targets}"),
        ),
        (
            Text("length", "长度"),
            Text(
                f"median {middle:,}, 95% up to {high:,}, longest {longest:,}",
                f"中位数 {middle:,}，95% 不超过 {high:,}，最长 {longest:,}",
            ),
        ),
        (Text(f"longer than {limit}", f"长于 {limit}"), _places(figures.too_long, figures)),
        (
            Text("rows of an epoch", "每轮行数"),
            Text(f"{rows}, filled to {fill}", f"{rows}，填充率 {fill}") if figures.rows else _NONE,
        ),
        (Text("without an answer", "没有答案"), _places(figures.unanswered, figures)),
        (
            Text("answer cannot be generated", "答案无法生成"),
            _places(figures.unwritable, figures),
        ),
        (Text("characters not in the vocabulary", "词表中没有的字符"), missing_text(figures)),
        (Text("same as an earlier record", "与之前的记录相同"), _places(figures.same, figures)),
        (
            Text("same context, another answer", "上下文相同而答案不同"),
            _places(figures.contradicting, figures),
        ),
        (
            Text("near-duplicate of an earlier record", "与之前的记录近似重复"),
            _places(figures.near, figures),
        ),
    ]


def missing_text(figures: Figures) -> Text:
    if not figures.missing:
        return _NONE
    shown = " ".join(f"{c!r} ({n:,})" for c, n in figures.missing.most_common(_SHOWN))
    more = len(figures.missing) - _SHOWN
    count, records = f"{len(figures.missing):,}", f"{figures.with_missing:,}"
    share = f"{figures.share(figures.with_missing):.1%}"
    return Text(
        f"{count} in {records} records ({share}): {shown}"
        + (f" and {more:,} more" if more > 0 else ""),
        f"{count} 个，出现在 {records} 条记录中（{share}）：{shown}"
        + (f" 等，另有 {more:,} 个" if more > 0 else ""),
    )


def _places(places: Places, figures: Figures) -> Text:
    if not places.count:
        return _NONE
    more = ", ..." if places.count > len(places.first) else ""
    # A set that is one file need not be named again.
    first = ", ".join(where.removeprefix(figures.name).lstrip("/:") for where in places.first)
    count, share = f"{places.count:,}", f"{figures.share(places.count):.1%}"
    return Text(f"{count} ({share}), at {first}{more}", f"{count}（{share}），位于 {first}{more}")


def overlap_lines(overlap: Overlap, evaluation: Figures) -> list[tuple[Text, Text]]:
    return [
        (
            Text("same context as a training record", "与某条训练记录上下文相同"),
            _places(overlap.same, evaluation),
        ),
        (
            Text("near-duplicate of a training record", "与某条训练记录近似重复"),
            _places(overlap.near, evaluation),
        ),
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
            lines += ["", f"  {_in_words(title)}", *bars(counts, sum(c for _, c in counts))]
        lines.append("")
    if overlap is not None:
        lines += [said(f"{sets[1].name} compared with {sets[0].name}")]
        lines += [*_table(overlap_lines(overlap, sets[1])), ""]
    return "\n".join(lines)


def balances(figures: Figures) -> list[tuple[Text, list[tuple[str, int]]]]:
    """The distributions of answers that are worth a look."""
    found = []
    if figures.labels:
        found.append((Text("answers", "答案"), figures.labels.most_common()))
    if figures.positions:
        title = Text("the option that is the answer", "哪个选项是答案")
        found.append((title, sorted(figures.positions.items())))
    return found


def _table(rows: list[tuple[Text, Text]]) -> list[str]:
    words = [(_in_words(name), _in_words(value)) for name, value in rows]
    most = max(width(name) for name, _ in words)
    return [f"  {name}{' ' * (most - width(name))}  {value}" for name, value in words]


def _in_words(text: Text) -> str:
    return text.chinese if is_chinese() else text.english


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
