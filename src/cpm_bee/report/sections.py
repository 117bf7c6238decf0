"""The sections of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from cpm_bee.html_pages import Text, both, escape, escaped
from cpm_bee.report.charts import GIB
from cpm_bee.report.drawing import Curves
from cpm_bee.report.facts import Facts
from cpm_bee.report.history import History
from cpm_bee.report.html import folded, section, table

_TITLES = {  # of the charts, and what their colors mean
    "loss": (Text("Loss", "损失"), Text("training", "训练"), Text("evaluation", "评测")),
    "accuracy": (
        Text("Evaluation", "评测指标"),
        Text("exact match", "完全一致率"),
        Text("token accuracy", "token 准确率"),
    ),
    "rate": (Text("Learning rate", "学习率"),),
    "speed": (Text("Tokens per second", "每秒 token 数"),),
    "gradient": (Text("Gradient norm", "梯度范数"),),
    "memory": (
        Text("Peak memory (GiB)", "内存峰值（GiB）"),
        Text("host", "主机"),
        Text("GPU", "GPU"),
    ),
}
_TABLE_ROWS = 20  # of steps, where there are no curves
_ROWS = 30  # of evaluations before the rest is folded


def key_figures(history: History, metric: str) -> str:
    figures = []
    best, steps = history.best(metric), history.num_steps
    if best is not None:
        first = history.evaluations[0]
        for name, title, shown in (
            ("exact_match", both("Exact match", "完全一致率"), _share),
            ("loss", both("Evaluation loss", "评测损失"), _loss),
        ):
            before, after = shown(first[name]), shown(best[name])
            note = both(f"before: {before}", f"训练前：{before}")
            if best["step"]:
                at = best["step"]
                note += both(f", best at step {at}", f"，最好：第 {at} 步")
            figures.append((title, after, note))
    if steps:
        epochs = history.start.get("options", {}).get("epoch", "?")
        epoch = f"{history.epoch + 1}/{escape(epochs)}"
        note = both(f"epoch {epoch}", f"第 {epoch} 轮")
        figures.append((both("Steps", "步数"), f"{history.step:,}", note))
        seconds, tokens = history.seconds, history.tokens
        note = both("in training steps", "训练步用时")
        figures.append((both("Time", "用时"), _duration(seconds), note))
        note = both(f"{tokens:,} tokens in all", f"共 {tokens:,} 个 token")
        figures.append(
            (both("Tokens/s", "每秒 token 数"), f"{tokens / max(seconds, 1e-9):,.0f}", note)
        )
    if history.samples:
        last = history.samples[-1]
        gpu = last.get("gpu_memory")
        note = both("host (process of rank 0)", "主机（rank 0 进程）")
        if gpu:
            note = both(
                f"GPU; host {_gib(last['host_memory'])}", f"GPU；主机 {_gib(last['host_memory'])}"
            )
        figures.append((both("Peak memory", "内存峰值"), _gib(gpu or last["host_memory"]), note))
    cells = (f"<div><dt>{t}</dt><dd>{v}<small>{n}</small></dd></div>" for t, v, n in figures)
    return f'<dl class="figures-top">{"".join(cells)}</dl>' if figures else ""


def curves(history: History, drawn: Curves | None, *, lacks_matplotlib: bool, failure: str) -> str:
    notes = []
    if lacks_matplotlib:
        command = "<code>pip install -e '.[report]'</code>"
        notes.append(both(f"Curves need an extra: {command}", f"曲线需要安装附加依赖：{command}"))
    if failure:
        why = escape(failure)
        notes.append(both(f"The curves could not be drawn: {why}", f"无法绘制曲线：{why}"))
    content = "".join(f'<p class="soft">{note}</p>' for note in notes)
    if drawn is not None:
        figures = []
        for name, svg in drawn.svg.items():
            title, *keys = _TITLES[name]
            lines = "".join(
                f'<span class="key" style="--key: var(--c{i})">{escaped(key)}</span>'
                for i, key in enumerate(keys, start=1)
                if name != "memory" or any(s.get(_MEMORY[i - 1]) for s in history.samples)
            )
            figures.append(
                f'<figure role="img" aria-label="{escape(title.english)}">'
                f"<h3>{escaped(title)}{lines}</h3>{svg}</figure>"
            )
        content += f'<div class="charts">{"".join(figures)}</div>'
        note = both("Horizontal axis: steps.", "横轴：步数。")
        if drawn.step < history.step:
            note += both(f" Up to step {drawn.step:,}.", f"截至第 {drawn.step:,} 步。")
        content += f'<p class="soft">{note}</p>'
    elif history.num_steps:
        content += _steps_table(history)
    else:
        content += f"<p>{both('No step has ended yet.', '尚未完成任何训练步。')}</p>"
    heading = both("Steps", "训练步") if drawn is None else both("Curves", "曲线")
    return section("curves", heading, content)


_MEMORY = ("host_memory", "gpu_memory")


def _steps_table(history: History) -> str:
    names = ("step", "loss", "lr", "grad_norm", "tokens_per_second")
    columns = history.thinned(*names, limit=_TABLE_ROWS)
    formats: tuple[Callable[[float], str], ...] = (
        lambda v: f"{v:,.0f}", _loss, lambda v: f"{v:.2e}", _loss, lambda v: f"{v:,.0f}",
    )  # fmt: skip
    rows = [
        [show(value) for show, value in zip(formats, row, strict=True)]
        for row in zip(*columns.values(), strict=True)
    ]
    header = [
        both("step", "步"), both("loss", "损失"), both("learning rate", "学习率"),
        both("gradient norm", "梯度范数"), both("tokens/s", "每秒 token 数"),
    ]  # fmt: skip
    note = both("Means of neighbouring steps.", "相邻各步的平均值。")
    return table(header, rows, "figures") + f'<p class="soft">{note}</p>'


def evaluations(history: History, metric: str) -> str:
    best = history.best(metric)
    if best is None:
        return ""
    rows = []
    for event in reversed(history.evaluations):
        mark = f' <span class="best">★ {both("best", "最好")}</span>' if event is best else ""
        rows.append([
            f"{event['step']:,}{mark}", _loss(event["loss"]), _share(event["exact_match"]),
            _share(event["token_accuracy"]), f"{event['records']:,}",
        ])  # fmt: skip
    header = [
        both("after step", "第几步后"), both("loss", "损失"), both("exact match", "完全一致率"),
        both("token accuracy", "token 准确率"), both("records", "记录数"),
    ]  # fmt: skip
    content = table(header, rows[:_ROWS], "figures")
    if len(rows) > _ROWS:
        older = both(
            f"{len(rows) - _ROWS} earlier evaluations", f"更早的 {len(rows) - _ROWS} 次评测"
        )
        content += folded(older, table(header, rows[_ROWS:], "figures"))
    return section("evaluations", both("Evaluations", "评测"), content)


def samples(history: History) -> str:
    """The sample answers of the latest evaluation and, folded, those of all evaluations."""
    if not history.samples or not history.samples[-1]["samples"]:
        return ""
    by_number: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for event in history.samples:
        for sample in event["samples"]:
            by_number.setdefault(sample["number"], []).append((event["step"], sample))
    last = history.samples[-1]["step"]
    intro = both(
        f"Records of the evaluation set, with the answers after step {last:,}. What follows the "
        "first wrong token is not shown (…).",
        f"评测集中的若干记录及第 {last:,} 步后的答案；首个错误 token 之后的内容不显示（…）。",
    )
    cards = "".join(_sample(answers) for answers in by_number.values())
    content = f'<p class="soft">{intro}</p><div class="samples">{cards}</div>'
    return section("samples", both("Sample answers", "样例答案"), content)


def _sample(answers: Sequence[tuple[int, dict[str, Any]]]) -> str:
    _, latest = answers[-1]
    is_right = latest["is_correct"]
    parts = [f'<p class="record">{escape(latest["context"])}</p>']
    if is_right:
        label = both("right", "正确")
        parts.append(f'<p><span class="mark">✓ {label}</span>{_written(latest)}</p>')
    else:
        label, wanted = both("wrong", "错误"), both("expected:", "应为：")
        parts.append(f'<p><span class="mark">✗ {label}</span>{_written(latest)}</p>')
        parts.append(f'<p class="soft">{wanted}{_apart(latest["expected"])}</p>')
    rows = []
    for _, group in groupby(answers, key=lambda a: (a[1]["written"], a[1]["is_correct"])):
        found = list(group)
        first, end, sample = found[0][0], found[-1][0], found[0][1]
        steps = f"{first:,}" if first == end else f"{first:,} – {end:,}"
        mark = "✓" if sample["is_correct"] else "✗"
        kind = "right" if sample["is_correct"] else "wrong"
        rows.append(
            [
                steps,
                f'<span class="{kind}"><span class="mark">{mark}</span></span>',
                _written(sample),
            ]
        )
    if len(answers) > 1:
        header = [both("after step", "第几步后"), "", both("answer", "答案")]
        title = both(f"all {len(answers)} evaluations", f"全部 {len(answers)} 次评测")
        parts.append(folded(title, table(header, rows)))
    return f'<div class="sample {"right" if is_right else "wrong"}">{"".join(parts)}</div>'


def _written(sample: dict[str, Any]) -> str:
    empty = f' <span class="soft">{both("(empty)", "（空）")}</span>'
    return _apart(sample["written"]) if sample["written"] else empty


def _apart(text: str) -> str:
    """A text after another one; on lines of its own if it has several."""
    return ("\n" if "\n" in text else " ") + escape(text)


def commands(facts: Facts) -> str:
    folder = f"<code>{escape(facts.folder)}</code>"
    parts = [
        f'<p class="soft">{both(f"In the folder {folder}:", f"在文件夹 {folder} 中运行：")}</p>'
    ]
    for title, command in facts.commands:
        parts.append(
            f"<h3>{escaped(title)}</h3>"
            f'<div class="command"><pre><code>{escape(command)}</code></pre>'
            f'<button type="button" hidden>{both("copy", "复制")}</button></div>'
        )
    rows = [[f"<code>{escape(name)}</code>", escaped(what)] for name, what in facts.files]
    parts.append(folded(both("files", "文件"), table([], rows)))
    return section("commands", both("Use the result", "使用结果"), "".join(parts))


def data(facts: Facts) -> str:
    names = [both("training", "训练集"), both("evaluation", "评测集")][: len(facts.sets)]
    header = [
        "",
        *(f"{n}<br><code>{escape(s)}</code>" for n, s in zip(names, facts.sets, strict=True)),
    ]
    rows = [[escaped(figure.name), *map(escape, figure.values)] for figure in facts.data]
    return section("data", both("Data", "数据"), table(header, rows, "figures"))


def settings(history: History, facts: Facts) -> str:
    def rows(flags: Sequence[Any]) -> list[list[str]]:
        return [
            [f"<code>{escape(s.flag)}</code>", f"<code>{escape(s.value)}</code>"] for s in flags
        ]

    own = [s for s in facts.settings if not s.is_default]
    others = [s for s in facts.settings if s.is_default]
    lines = "".join(f"<li><code>{escape(line)}</code></li>" for line in facts.summary)
    content = table([both("flag", "参数"), both("value", "值")], rows(own))
    title = both(f"{len(others)} flags with their defaults", f"{len(others)} 个取默认值的参数")
    content += folded(title, table([], rows(others)))
    content += folded(
        both("what the run printed at its start", "启动时打印的内容"), f"<ul>{lines}</ul>"
    )
    return section("settings", both("Settings", "设置"), content)


def environment(facts: Facts) -> str:
    rows = [[escaped(name), escape(value)] for name, value in facts.environment]
    return section("environment", both("Environment", "运行环境"), table([], rows))


def _share(value: float) -> str:
    return f"{value:.1%}"


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
