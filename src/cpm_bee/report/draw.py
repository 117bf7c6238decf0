"""Draws the curves of a report: a process of its own, the only one that imports matplotlib.

    python -m cpm_bee.report.draw < charts.json > drawn.json

The charts are those of `charts_of`. The result has an SVG image of each by name ("svg") and a PNG
image of loss and learning rate in base64 ("png").

Text in the SVG images stays text (`svg.fonttype: none`), in the font of the page. Colors become the
page's own variables, so that the images follow its light and dark theme.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
from typing import Any

# Colors that stand for variables of the page.
_PLACEHOLDERS = {
    "c1": "#0a0b01", "c2": "#0a0b02", "text": "#0a0b03", "grid": "#0a0b04",
}  # fmt: skip
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _PLACEHOLDERS["grid"],
    "xtick.color": _PLACEHOLDERS["grid"],
    "ytick.color": _PLACEHOLDERS["grid"],
    "xtick.labelcolor": _PLACEHOLDERS["text"],
    "ytick.labelcolor": _PLACEHOLDERS["text"],
    "grid.color": _PLACEHOLDERS["grid"],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "axes.formatter.limits": (-3, 5),
}
_SIZE = (4.6, 2.3)  # inches of 72 points


def draw(charts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the images of charts, see above."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not those of the user
        matplotlib.rcParams.update(_SETTINGS)
        return {
            "svg": {name: _svg(name, chart) for name, chart in charts.items()},
            "png": base64.b64encode(_png(charts)).decode(),
        }


def _svg(name: str, chart: dict[str, Any]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = name  # the same names in the image each time
    figure = Figure(figsize=_SIZE, layout="constrained")
    _plot(figure.add_subplot(), chart, _PLACEHOLDERS)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(name, file.getvalue())


def _plot(axes: Any, chart: dict[str, Any], colors: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for line in chart["lines"]:
        if line["x"]:
            values = [math.nan if value is None else value for value in line["y"]]
            marker = "o" if line["marked"] else None
            axes.plot(line["x"], values, color=colors[line["color"]], marker=marker)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if chart["percent"]:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _for_page(name: str, svg: str) -> str:
    """The `<svg>` element alone, with names of its own and the variables of the page."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    svg = f'{head} aria-hidden="true">{rest}'
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for variable, color in _PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg)


def _png(charts: dict[str, dict[str, Any]]) -> bytes:
    """Loss and learning rate, in English: a font with Chinese characters may be missing."""
    from matplotlib.figure import Figure

    colors = {"c1": "#2563c9", "c2": "#d9480f", "text": "#333333", "grid": "#cccccc"}
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    shown = [name for name in ("loss", "rate") if name in charts]
    titles = {"loss": "loss (training: line, evaluation: points)", "rate": "learning rate"}
    for place, name in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, place + 1)
        _plot(axes, charts[name], colors)
        axes.set_title(titles[name], loc="left", fontsize=10)
        axes.tick_params(colors=colors["grid"], labelcolor=colors["text"])
        axes.grid(color=colors["grid"])
        for spine in axes.spines.values():
            spine.set_edgecolor(colors["grid"])
    if shown:
        figure.axes[-1].set_xlabel("step", color=colors["text"])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return file.getvalue()


if __name__ == "__main__":
    os.nice(19)  # the training comes first
    json.dump(draw(json.load(sys.stdin)), sys.stdout)
