"""The figures of data, and records as the model sees them, as one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence

from cpm_bee.data.inspect.figures import Figures, Overlap
from cpm_bee.data.inspect.report import balances, histogram, lines_of, overlap_lines
from cpm_bee.data.inspect.tokens import Segment
from cpm_bee.html_pages import LANGUAGE_SWITCH, Text, both, document, escape, escaped

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #5f6670; --line: #d9dce1;
  --bar: #2f6fb2; --over: #c2452d; --target: #ffe9a8; --unknown: #f6c4bb; --hues: 94%;
  --card: var(--back); --c1: var(--bar); --c2: var(--over); }
header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e4e6ea; --soft: #9aa1ab;
  --line: #353940; --bar: #6ea8e5; --over: #f08a74; --target: #5c4a10; --unknown: #6b2b20;
  --hues: 20%; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); margin: 0 auto; padding: 1.5rem;
  max-width: 72rem; font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
h1, h2 { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); width: 17rem; }
.chart { display: grid; grid-template-columns: minmax(5rem, auto) 1fr max-content; gap: 2px .6rem;
  font-size: .85rem; align-items: center; max-width: 48rem; }
.name { text-align: right; overflow-wrap: anywhere; }
.bar, .over { height: 1.1rem; border-radius: 2px; background: var(--bar); }
.over { background: var(--over); }
.record { border: 1px solid var(--line); border-radius: 6px; padding: .75rem; margin: 1rem 0; }
.segment { overflow-wrap: anywhere; } .number { color: var(--soft); font-size: .8rem; }
.token { border-radius: 3px; padding: 0 .15rem; margin: 1px; display: inline-block;
  white-space: pre-wrap; }
.special { opacity: .65; font-size: .85em; } .unknown { background: var(--unknown) !important; }
.target .token { outline: 2px solid var(--target); font-weight: 600; }
.mark { color: var(--over); font-size: .75rem; margin-right: .3rem; }
.s0 .token { background: hsl(205 60% var(--hues)); }
.s1 .token { background: hsl(45 60% var(--hues)); }
.s2 .token { background: hsl(285 45% var(--hues)); }
.s3 .token { background: hsl(140 45% var(--hues)); }
.s4 .token { background: hsl(15 60% var(--hues)); }
@media (max-width: 40rem) { body { padding: .75rem; } th { width: 40%; } }
"""


def html_page(
    sets: Sequence[Figures],
    overlap: Overlap | None,
    shown: Sequence[tuple[str, Sequence[Segment]]],
) -> str:
    """The page: needs no network, follows light and dark, and is in both languages."""
    top = both("Data before training", "训练前的数据")
    parts = [f"<header><h1>{top}</h1>{LANGUAGE_SWITCH}</header>"]
    for figures in sets:
        parts += [f"<h2>{escape(figures.name)}</h2>", _table(lines_of(figures))]
        bins = histogram(figures.lengths, figures.max_length)
        rows = [(f"{a}–{b}", count, a > figures.max_length) for a, b, count in bins]
        parts += [f"<h3>{both('Lengths in tokens', '以 token 计的长度')}</h3>", _chart(rows)]
        for title, counts in balances(figures):
            rows = [(name, count, False) for name, count in counts]
            heading = Text(title.english.capitalize(), title.chinese)
            parts += [f"<h3>{escaped(heading)}</h3>", _chart(rows)]
    if overlap is not None:
        first, second = (escape(figures.name) for figures in sets[:2])
        heading = Text(f"{second} compared with {first}", f"{second} 与 {first} 的比较")
        parts += [f"<h2>{both(*heading)}</h2>", _table(overlap_lines(overlap, sets[1]))]
    if shown:
        parts.append(f"<h2>{both('Records as the model sees them', '模型看到的记录')}</h2>")
        parts.append(f"<p>{both(*_LEGEND)}</p>")
        parts += [_record(where, segments) for where, segments in shown]
    return document(f"{sets[0].name} · CPM-Bee", "\n".join(parts), style=_STYLE)


_TARGET = Text("target", "预测")
_LEGEND = Text(
    "Each line is a segment, indented by its depth; neighbouring colours tell segments apart. "
    f"Lines marked <em>{_TARGET.english}</em> are predicted, and then the end of the answer; all "
    "others are context. Red tokens are not in the vocabulary.",
    "每行是一个段，按深度缩进；相邻的颜色用来区分段。标有"
    f"<em>{_TARGET.chinese}</em>的行由模型预测，之后是答案的结束符；其余都是上下文。"
    "红色的 token 不在词表中。",
)


def _table(rows: list[tuple[Text, Text]]) -> str:
    cells = (f"<tr><th>{escaped(name)}</th><td>{escaped(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _chart(rows: Sequence[tuple[str, int, bool]]) -> str:
    """Horizontal bars; the last of each row says whether it is too long."""
    most, total = max((n for _, n, _ in rows), default=1) or 1, sum(n for _, n, _ in rows) or 1
    parts = ['<div class="chart">']
    for name, count, is_over in rows:
        kind = "over" if is_over else "bar"
        parts.append(
            f'<div class="name">{escape(name[:80])}</div>'
            f'<div><div class="{kind}" style="width: {100 * count / most:.1f}%"></div></div>'
            f"<div>{count:,} ({count / total:.1%})</div>"
        )
    return "".join([*parts, "</div>"])


def _record(where: str, segments: Sequence[Segment]) -> str:
    count = sum(len(segment.tokens) for segment in segments)
    length = both(f"{count} tokens", f"{count} 个 token")
    lines = [f'<div class="record"><div class="number">{escape(where)}: {length}</div>']
    for number, segment in enumerate(segments):
        tokens = "".join(
            f'<span class="token {token.kind}">{escape(token.text)}</span>'
            for token in segment.tokens
        )
        kind = "segment target" if segment.is_target else "segment"
        mark = f'<span class="mark">{escaped(_TARGET)}</span>' if segment.is_target else ""
        lines.append(
            f'<div class="{kind} s{number % 5}" style="margin-left: {1.2 * segment.depth:.1f}rem">'
            f"{mark}{tokens}</div>"
        )
    return "".join([*lines, "</div>"])
