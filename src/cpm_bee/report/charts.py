"""Which curves a run has: plain values, which a process without this library can draw."""

from __future__ import annotations

from typing import Any

from cpm_bee.report.history import History

GIB = 1 << 30


def charts_of(history: History) -> dict[str, dict[str, Any]]:
    """Returns the charts that have at least two points, by name, as JSON values.

    A chart has `lines`, each with x, y, a color ("c1", "c2") and whether its points are marked, and
    `percent`, whether its values are shares.
    """
    steps = history.thinned("step", "loss", "lr", "grad_norm", "tokens_per_second")
    evaluations, samples = history.evaluations, history.samples

    def of_steps(name: str) -> dict[str, Any]:
        return _line(steps["step"], steps[name], "c1")

    def of_events(events: list[dict[str, Any]], name: str, color: str, unit: float = 1) -> Any:
        found = [(e["step"], e[name] / unit) for e in events if e.get(name) is not None]
        return _line([x for x, _ in found], [y for _, y in found], color, marked=True)

    charts = {
        "loss": _chart(of_steps("loss"), of_events(evaluations, "loss", "c2")),
        "accuracy": _chart(
            of_events(evaluations, "exact_match", "c1"),
            of_events(evaluations, "token_accuracy", "c2"),
            percent=True,
        ),
        "rate": _chart(of_steps("lr")),
        "speed": _chart(of_steps("tokens_per_second")),
        "gradient": _chart(of_steps("grad_norm")),
        "memory": _chart(
            of_events(samples, "host_memory", "c1", GIB),
            of_events(samples, "gpu_memory", "c2", GIB),
        ),
    }
    return {
        name: chart
        for name, chart in charts.items()
        if any(len(line["x"]) > 1 for line in chart["lines"])
    }


def _line(x: list[float], y: list[float], color: str, *, marked: bool = False) -> dict[str, Any]:
    values = [value if value == value else None for value in y]  # JSON has no NaN
    return {"x": x, "y": values, "color": color, "marked": marked}


def _chart(*lines: dict[str, Any], percent: bool = False) -> dict[str, Any]:
    return {"lines": list(lines), "percent": percent}
