"""The flags of inspect_data.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import not_negative, positive, whole_number
from cpm_bee.options import REQUIRED, CommandOptions, Group

FILES = Group("files", "文件")
TRAINING = Group("training", "训练")
OUTPUT = Group("output", "输出")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CommandOptions):
    """The flags of inspect_data.py."""

    script = "inspect_data.py"
    description = (
        "Look at data before training: lengths and the share that is too long, how full the rows "
        "of a step get, characters that the vocabulary lacks, empty answers, the balance of "
        "labels, duplicates within the data and between training and evaluation, and records as "
        "the model sees them. Reads and reports; writes nothing but what --picture and --html name."
    )
    chinese = (
        "训练之前查看数据：长度与超长比例、每步各行的填充率、词表中没有的字符、空答案、标签分布、"
        "数据内部及训练集与评测集之间的重复，以及模型实际看到的记录。只读取和报告；"
        "除 `--picture` 和 `--html` 指定的文件外什么都不写。"
    )
    groups = (FILES, TRAINING, OUTPUT)
    hints = hints.INSPECT

    input: str = FILES.option(
        REQUIRED,
        "data to look at: a dataset made by `preprocess_dataset.py`, or a file or folder of "
        "records or of any form that `convert_data.py` recognises",
        "要查看的数据：`preprocess_dataset.py` 生成的数据集，或记录文件（夹），"
        "或 `convert_data.py` 能识别的任何形式",
        metavar="PATH",
    )
    eval: str | None = FILES.option(
        None,
        "evaluation data, in any of the same forms: its own figures, and duplicates between both",
        "评测数据（形式同上）：给出它的各项数字以及两者之间的重复",
        metavar="PATH",
    )
    vocab: str | None = FILES.option(
        None,
        "vocabulary of the model; that of the base model in `src/ckpts` when not given",
        "模型的词表；不指定时用 `src/ckpts` 中基座模型的词表",
        metavar="FILE",
    )
    escape: bool = FILES.option(
        False,
        "treat the texts of records as plain text, as preprocess_dataset.py does",
        "把记录中的文本当作普通文本，与 preprocess_dataset.py 相同",
    )
    max_length: int = TRAINING.option(
        2048, "tokens of a row, as in training", "每行的 token 数，与训练时相同", type=positive
    )
    batch_size: int = TRAINING.option(
        32, "rows of a step, as in training", "每步的行数，与训练时相同", type=positive
    )
    seed: int = TRAINING.option(
        1234,
        "seed of the packing, as in training",
        "装箱的随机种子，与训练时相同",
        type=whole_number,
    )
    show: int = OUTPUT.option(
        0,
        "also show the first N records as the model sees them: tokens by segment, targets marked",
        "另显示前 N 条记录在模型眼中的样子：按段着色的 token，并标出要预测的部分",
        type=not_negative,
    )
    picture: str | None = OUTPUT.option(
        None,
        "write the histogram of lengths as a picture: `.png`, `.svg` or `.pdf` (needs matplotlib)",
        "把长度直方图写成图片：`.png`、`.svg` 或 `.pdf`（需要 matplotlib）",
        metavar="FILE",
    )
    html: str | None = OUTPUT.option(
        None,
        "write everything as one page, in English and Chinese, that opens without network",
        "把全部内容写成一个无需联网即可打开的中英双语网页",
        metavar="FILE",
    )
