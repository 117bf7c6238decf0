"""The flags of merge_delta.py and convert_checkpoint.py. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cpm_bee import hints
from cpm_bee.cli import real_number
from cpm_bee.errors import InputError
from cpm_bee.options import (
    REQUIRED,
    CommandOptions,
    Group,
    recorded_alpha_option,
    vocab_option,
)

AUTO, NATIVE, HUGGING_FACE, DELTA, PEFT = "auto", "native", "huggingface", "delta", "peft"
SHARD_SIZE = 5.0  # GB

MODEL = Group("model", "模型")
OUTPUT = Group("output", "输出")

_above_zero = real_number(0, exclusive=True)


def generation_command(source: Path, *flags: str) -> str:
    """A line for people: the command that tries a model.

    Args:
        source: the folder of the entry scripts.
        flags: those that name the model.
    """
    command = ["python", "text_generation.py", *flags, "--input", "-", "--output", "-"]
    folder = shlex.quote(str(source))
    return f"next, with records on standard input: cd {folder} && {shlex.join(command)}"


class WeightedDelta(NamedTuple):
    """A delta file and the factor that it is merged with."""

    path: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> WeightedDelta:
        """Read `FILE` or `FILE=WEIGHT`; a file whose own name has the `=` is found, too."""
        path, equals, number = text.rpartition("=")
        if not equals or Path(text).exists():
            return cls(text, 1.0)
        try:
            weight = float(number)
        except ValueError:
            return cls(text, 1.0)
        if not path or not math.isfinite(weight):
            raise argparse.ArgumentTypeError(f"{text} is not FILE or FILE=WEIGHT")
        return cls(path, weight)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(CommandOptions):
    """The flags of merge_delta.py."""

    script = "merge_delta.py"
    description = (
        "Merge deltas into their base model. The result is a model of its own, which needs no "
        "delta. Before it takes its name, its logits are compared with those of base and deltas."
    )
    chinese = (
        "把增量合并进基座模型，得到不再需要增量的完整模型。"
        "写好之后先与“基座加增量”比较 logits，一致才启用输出的名字。"
    )
    groups = (MODEL, OUTPUT)
    hints = hints.MERGE

    load: str = MODEL.option(
        REQUIRED,
        "base model: a checkpoint file (`.bin`, `.pt`, `.safetensors`), an index of shards, or a "
        "folder with one of them",
        "基座模型：检查点文件（`.bin`、`.pt`、`.safetensors`）、分片索引，或包含它们的文件夹",
        metavar="CHECKPOINT",
    )
    vocab: str | None = vocab_option(MODEL)
    delta: tuple[WeightedDelta, ...] = MODEL.option(
        REQUIRED,
        "delta file, with a factor if it is not 1 (`FILE=0.5`); repeat the flag for several deltas",
        "增量文件，系数不为 1 时写作 `FILE=0.5`；有多个增量时重复此参数",
        type=WeightedDelta.parse,
        metavar="FILE[=WEIGHT]",
        repeated=True,
    )
    delta_alpha: float | None = recorded_alpha_option(MODEL)
    output: str = OUTPUT.option(
        REQUIRED,
        "folder for the merged model, with its config and vocabulary",
        "存放合并后模型的文件夹，其中也有配置和词表",
        metavar="FOLDER",
    )
    to: str = OUTPUT.option(
        AUTO,
        "format of the result; `auto` is that of the base",
        "结果的格式；`auto` 与基座模型相同",
        choices=(AUTO, NATIVE, HUGGING_FACE),
    )
    shard_size: float = OUTPUT.option(
        SHARD_SIZE,
        "largest size of a file in GB, where the result is in the format `huggingface`",
        "格式为 `huggingface` 时单个文件的上限（GB）",
        type=_above_zero,
    )
    overwrite: bool = OUTPUT.option(False, "replace an existing model", "覆盖已有的模型")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CommandOptions):
    """The flags of convert_checkpoint.py."""

    script = "convert_checkpoint.py"
    description = (
        "Convert a model between the native and the Hugging Face format, or a delta to an adapter "
        "folder of PEFT and back. Values and types stay as they are, bit for bit."
    )
    chinese = (
        "在原生格式与 Hugging Face 格式之间转换模型，或在增量文件与 PEFT 的 adapter 文件夹之间"
        "转换。数值和类型逐位不变。"
    )
    groups = (MODEL, OUTPUT)
    hints = hints.CONVERT

    input: str = MODEL.option(
        REQUIRED,
        "what to convert: a model (a checkpoint file, an index of shards, or a folder), a delta "
        "file, or a PEFT adapter folder",
        "要转换的内容：模型（检查点文件、分片索引或文件夹）、增量文件，或 PEFT 的 adapter 文件夹",
        metavar="PATH",
    )
    load: str | None = MODEL.option(
        None,
        "base model of a delta or adapter: checks that it fits, and records the base in the result",
        "增量或 adapter 所属的基座模型：检查二者是否匹配，并在结果中记录基座",
        metavar="CHECKPOINT",
    )
    vocab: str | None = vocab_option(MODEL)
    delta_alpha: float | None = recorded_alpha_option(MODEL)
    to: str = OUTPUT.option(
        REQUIRED,
        "format of the result: `native` and `huggingface` for a model, `peft` for a delta, "
        "`delta` for a PEFT adapter",
        "结果的格式：模型可选 `native` 和 `huggingface`，增量选 `peft`，PEFT adapter 选 `delta`",
        choices=(NATIVE, HUGGING_FACE, DELTA, PEFT),
    )
    output: str = OUTPUT.option(
        REQUIRED,
        "folder for the result; for `--to delta` a file",
        "存放结果的文件夹；`--to delta` 时为文件",
        metavar="PATH",
    )
    shard_size: float | None = OUTPUT.option(
        None,
        f"with `--to huggingface`: largest size of a file in GB; {SHARD_SIZE:g} when not given",
        f"与 `--to huggingface` 合用：单个文件的上限（GB）；不指定时为 {SHARD_SIZE:g}",
        type=_above_zero,
    )
    overwrite: bool = OUTPUT.option(False, "replace an existing result", "覆盖已有的结果")

    def __post_init__(self) -> None:
        if self.shard_size is not None and self.to != HUGGING_FACE:
            raise InputError("--shard-size: needs --to huggingface")
        if self.delta_alpha is not None and self.to != PEFT:
            raise InputError("--delta-alpha: needs --to peft; an adapter records its alpha")
        if self.load is not None and self.to not in (DELTA, PEFT):
            raise InputError("--load: is the base of a delta or adapter; a model is the --input")
        if self.vocab is not None and self.load is None and self.to in (DELTA, PEFT):
            raise InputError("--vocab: needs --load, whose vocabulary it is")
