"""The flags of text_generation.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpm_bee import hints
from cpm_bee.cli import positive, share
from cpm_bee.errors import InputError
from cpm_bee.generate.options import (
    FILES,
    MACHINE,
    MODEL,
    SEARCH,
    ExampleOptions,
    GenerationOptions,
    LoadedModelOptions,
)
from cpm_bee.options import CommandOptions, Group, keep_option

PROMPT = Group("a prompt instead of a file", "以提示代替文件")
CHOICE = Group("options of a record", "选择题")


def _orders(words: Sequence[str]) -> int:
    """The number of orders in the words after `--choices`.

    Raises:
        InputError: they are neither none nor `average-orders N`.
    """
    if not words:
        return 1
    if len(words) != 2 or words[0] != "average-orders":
        raise InputError(
            f"--choices {' '.join(words)}: write --choices or --choices average-orders N"
        )
    try:
        return positive(words[1])
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--choices average-orders: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TextGenerationOptions(GenerationOptions, ExampleOptions, LoadedModelOptions, CommandOptions):
    """The flags of text_generation.py."""

    script = "text_generation.py"
    description = (
        "Answer records with a model: reads a file of records and writes the same records with "
        'the text under "<ans>" replaced by the model\'s answer (null if the model reached '
        "--max-length before that answer). If the input has answers, it prints the share of exact "
        "matches."
    )
    chinese = (
        "用模型回答记录：读入一个记录文件，写出同样的记录，其中 `<ans>` 下的文本换成模型的答案"
        "（如果写到该答案之前已达到 `--max-length`，则为 `null`）。"
        "若输入中带有答案，还会打印完全一致的比例。"
    )
    groups = (FILES, PROMPT, MODEL, CHOICE, SEARCH, MACHINE)
    hints = hints.GENERATE

    input: str | None = FILES.option(
        None,
        "records, one JSON object per line; `-` is standard input; needs `--output`. With neither "
        "`--input` nor `--prompt` records are asked for on the terminal",
        "记录文件，每行一个 JSON 对象；`-` 为标准输入；需要 `--output`。"
        "`--input` 和 `--prompt` 都不给时在终端中逐条输入",
        metavar="FILE",
    )
    output: str | None = FILES.option(
        None,
        "file for the answered records; `-` is standard output",
        "写入作答后的记录的文件；`-` 为标准输出",
        metavar="FILE",
    )
    resume: bool = FILES.option(
        False,
        "continue after the records that an interrupted run of the same command left in "
        "`OUTPUT.partial`",
        "接着上次中断时留在 `OUTPUT.partial` 中的记录继续生成（命令须与上次相同）",
    )
    escape: bool = FILES.option(
        False,
        "treat all texts as plain text, as in preprocess_dataset.py: a literal `<` needs no "
        "escaping, and the output has none",
        "把所有文本当作普通文本，与 preprocess_dataset.py 相同：字面的 `<` 无需转义，输出也不转义",
    )
    keep: tuple[str, ...] = keep_option(FILES)
    prompt: str | None = PROMPT.option(
        None,
        "one record as JSON, or a plain text, which becomes the `input` of a record; its answer is "
        "printed",
        "一条 JSON 记录，或一段普通文本（作为记录的 `input`）；打印其答案",
        metavar="RECORD",
    )
    instruction: str | None = PROMPT.option(
        None,
        'the `prompt` of records that are made from plain texts, such as "Translate into English"',
        "由普通文本构成的记录的 `prompt` 字段，如“翻译成英文”",
        metavar="TEXT",
    )
    stream: bool = PROMPT.option(
        False,
        "print an answer while it is written; with several beams, as far as they agree",
        "边生成边打印答案；有多个束时打印它们一致的部分",
    )
    choices: int | None = CHOICE.option(
        None,
        "answer records with options by the most probable option, and write the probabilities of "
        "all under `<choices>`; with `average-orders N` they are averaged over N orders of the "
        "options. Records without options are generated",
        "对带选项的记录，以概率最大的选项作答，并把各选项的概率写在 `<choices>` 下；"
        "`average-orders N` 表示对 N 种选项顺序取平均。没有选项的记录照常生成",
        words=_orders,
        metavar="average-orders N",
    )
    abstain_below: float | None = CHOICE.option(
        None,
        "answer `null` if no option has at least this probability; needs `--choices`",
        "没有任何选项达到该概率时答案为 `null`；需要 `--choices`",
        type=share(),
        metavar="P",
    )

    def __post_init__(self) -> None:
        GenerationOptions.__post_init__(self)
        LoadedModelOptions.__post_init__(self)
        problems = [*self._problems_of_source(), *self._problems_of_choices()]
        if problems:
            raise InputError("\n".join(problems))

    def _problems_of_source(self) -> Iterator[str]:
        if self.input is not None:
            if self.output is None:
                yield "--output: is needed with --input (- is standard output)"
            for name in ("prompt", "instruction", "stream"):
                if getattr(self, name) not in (None, False):
                    yield f"--{name}: is not for a file of records (--input)"
            return
        for name in ("output", "resume", "keep"):
            if getattr(self, name):
                yield f"--{name}: needs --input"
        if self.stream and (self.num_return > 1 or self.choices is not None):
            yield "--stream: shows one answer while it is written, not with --num-return, --choices"

    def _problems_of_choices(self) -> Iterator[str]:
        if self.abstain_below is not None and self.choices is None:
            yield "--abstain-below: needs --choices"
        if "<ans>" in self.keep:
            yield "--keep: <ans> is what the model writes"

    def files_read(self) -> Iterator[str | Path]:
        """The files that this command reads, as far as they are known before it opens them."""
        if self.input is not None:
            yield self.input
        if self.examples is not None:
            yield self.examples
        yield from self.model_files()
