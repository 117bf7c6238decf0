"""What the report says about a run besides its log: data, settings, commands, environment."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import cpm_bee
from cpm_bee.cli import shown_default
from cpm_bee.engine import Engine
from cpm_bee.html_pages import Text
from cpm_bee.report.facts import DataFigure, Facts, Setting
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.model_options import AUTO
from cpm_bee.train.options import Options

_SCRIPTS = Path(cpm_bee.__file__).resolve().parent.parent


def facts_of(
    options: Options,
    engine: Engine,
    loaders: Sequence[DataLoader],
    files: RunFiles,
    summary: Sequence[str],
) -> Facts:
    """Returns the facts of a run.

    Args:
        loaders: of the training set and, if there is one, of the evaluation set.
    """
    sets = [options.dataset, options.eval_dataset][: len(loaders)]
    return Facts(
        name=options.save_name,
        metric=options.metric_for_best,
        sets=[name for name in sets if name is not None],
        data=_data(loaders),
        settings=_settings(options),
        commands=_commands(options, files),
        folder=os.getcwd(),
        summary=[line for text in summary for line in text.splitlines()],
        environment=_environment(engine),
        files=[
            (
                str(files.best),
                Text("the best weights: these are the ones to use", "最优权重，应使用它"),
            ),
            (str(files.last), Text("the weights at the end", "训练结束时的权重")),
            (
                str(files.state),
                Text("the training state, for --resume", "训练状态，供 --resume 使用"),
            ),
            (str(files.log), Text("the log, one JSON object a line", "日志，每行一个 JSON 对象")),
        ],
    )


def _data(loaders: Sequence[DataLoader]) -> list[DataFigure]:
    lengths = [loader.used_lengths() for loader in loaders]
    sizes = [loader.size for loader in loaders]

    def figure(english: str, chinese: str, values: Sequence[float]) -> DataFigure:
        return DataFigure(Text(english, chinese), tuple(f"{value:,.0f}" for value in values))

    figures = [
        figure("records used", "使用的记录", [s.num_records for s in sizes]),
        figure("left out: longer than --max-length", "未使用：超过 --max-length",
               [s.num_too_long for s in sizes]),
        figure("left out: no answer", "未使用：没有答案", [s.num_unanswered for s in sizes]),
        figure("answers that can never be generated", "永远无法生成的答案",
               [s.num_unwritable for s in sizes]),
        figure("tokens", "token 数", [n.sum(dtype=np.int64) for n in lengths]),
        figure("tokens of a record: median", "每条记录的 token 数：中位数",
               [np.median(n) for n in lengths]),
        figure("tokens of a record: longest", "每条记录的 token 数：最长",
               [n.max() for n in lengths]),
    ]  # fmt: skip
    steps = figure("steps of an epoch, about", "每轮步数（约）", [s.min_steps for s in sizes[:1]])
    blank = ("",) * (len(loaders) - 1)
    return [*figures, steps._replace(values=(*steps.values, *blank))]


def _settings(options: Options) -> list[Setting]:
    found = []
    for flag in options.flags():
        value = getattr(options, flag.name)
        shown = (
            ("off", "on")[value]
            if flag.is_switch
            else "–"
            if value is None
            else shown_default(value)
        )
        found.append(Setting(flag.flag, shown, not flag.required and value == flag.default))
    return found


def _commands(options: Options, files: RunFiles) -> list[tuple[Text, str]]:
    model = ["--load", str(files.best)]  # its sidecar names config and vocabulary
    if options.use_delta:
        model = ["--load", str(options.load), "--delta", str(files.best)]
        if options.model_config != AUTO:
            model += ["--model-config", options.model_config]
        if options.vocab is not None:
            model += ["--vocab", options.vocab]
        if options.quantize != "none":
            model += ["--quantize", options.quantize]

    def command(script: str, *flags: str) -> str:
        return shlex.join(["python", os.path.relpath(_SCRIPTS / script), *flags])

    questions = ["--input", "questions.jsonl", "--output", "answers.jsonl"]
    commands = [
        (
            Text("Answer records, one JSON object a line", "回答记录（每行一个 JSON 对象）"),
            command("text_generation.py", *questions, *model),
        )
    ]
    if options.eval_dataset is not None:
        title = Text("Figures with their uncertainty", "带置信区间的评测")
        flags = ["--dataset", options.eval_dataset, *model]
        flags += ["--baseline"] if options.use_delta else []
        commands.append((title, command("evaluate.py", *flags)))
    if options.use_delta:
        flags = ["--load", str(options.load), "--delta", str(files.best)]
        flags += [] if options.vocab is None else ["--vocab", options.vocab]
        flags += ["--output", f"{files.best.with_suffix('')}-merged"]
        title = Text("Merge the delta into its base", "把增量合并进基座模型")
        commands.append((title, command("merge_delta.py", *flags)))
    return commands


def _environment(engine: Engine) -> list[tuple[Text, str]]:
    cuda = engine.device.type == "cuda"
    device = torch.cuda.get_device_name(engine.device) if cuda else platform.machine()
    return [
        (Text("cpm_bee", "cpm_bee"), cpm_bee.__version__),
        (Text("Python", "Python"), platform.python_version()),
        (Text("PyTorch", "PyTorch"), torch.__version__),
        (Text("device", "设备"), f"{engine.device.type} ({device})"),
        (Text("compute type", "计算精度"), str(engine.dtype).removeprefix("torch.")),
        (Text("processes", "进程数"), str(engine.world_size)),
        (Text("system", "操作系统"), f"{platform.system()} {platform.release()}"),
    ]
