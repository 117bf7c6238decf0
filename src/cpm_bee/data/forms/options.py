"""The flags of convert_data.py, and those that preprocess_dataset.py shares with it."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Mapping
from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import share, whole_number
from cpm_bee.data.forms.names import ROLES
from cpm_bee.options import REQUIRED, CommandOptions, Group

FILES = Group("files", "文件")
FORM = Group("form of the data", "数据的形式")
SPLIT = Group("split", "划分")

AUTO = "auto"
FORMS = ("records", "alpaca", "dialogue", "question-answer", "classification", "choices")


def column_map(text: str) -> dict[str, str]:
    """An argparse type: `ROLE=COLUMN,ROLE=COLUMN`."""
    found = pairs(text, "ROLE=COLUMN")
    for role in found:
        if role not in ROLES:
            raise argparse.ArgumentTypeError(f"{role!r} is none of {', '.join(ROLES)}")
    return found


def label_map(text: str) -> dict[str, str]:
    """An argparse type: `VALUE=NAME,VALUE=NAME`."""
    found = pairs(text, "VALUE=NAME")
    if len(set(found.values())) != len(found) or len(found) < 2:
        raise argparse.ArgumentTypeError("expected two or more labels with different names")
    return found


def pairs(text: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise argparse.ArgumentTypeError(f"{part!r}: expected {form},{form}")
        if name.strip() in found:
            raise argparse.ArgumentTypeError(f"{name.strip()} is given twice")
        found[name.strip()] = value.strip()
    return found


def encoding(text: str) -> str:
    """An argparse type: the name of a text encoding."""
    try:
        codecs.lookup(text)
        "".encode(text)
    except LookupError:
        raise argparse.ArgumentTypeError(f"{text!r} is no encoding that Python knows") from None
    return text


def eval_share(text: str) -> float:
    value = share(exclusive=True)(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 leaves nothing to train on")
    return value


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """How data of any form become records: flags of several scripts.

    Attributes:
        escape, seed: declared by the script itself, with its own words.
    """

    form: str = FORM.option(
        AUTO,
        "form of the data; `auto` recognises it by the first record of each file",
        "数据的形式；`auto` 按每个文件的第一条数据识别",
        choices=(AUTO, *FORMS),
    )
    columns: Mapping[str, str] | None = FORM.option(
        None,
        f"which column or key is what, where the names do not tell; roles: {', '.join(ROLES)}",
        f"名称无法识别时，指明各列（键）的含义；可用的含义：{', '.join(ROLES)}",
        type=column_map,
        metavar="ROLE=COLUMN,...",
    )
    no_header: bool = FORM.option(
        False,
        "the first row of a table is data; its columns are named `1`, `2`, ... in `--columns`",
        "表格首行即为数据；在 `--columns` 中各列名为 `1`、`2`……",
    )
    encoding: str | None = FORM.option(
        None,
        "encoding of text files, such as `gb18030`; UTF-8 when not given",
        "文本文件的编码，如 `gb18030`；不指定时为 UTF-8",
        type=encoding,
        metavar="NAME",
    )
    sheet: str | None = FORM.option(
        None,
        "sheet of an Excel file to read; all that are not empty when not given, which need the "
        "same columns",
        "要读取的 Excel 工作表；不指定时读取所有非空工作表，它们的列必须相同",
        metavar="NAME",
    )
    question: str | None = FORM.option(
        None,
        "question put into records that have none: of classification and choices",
        "为没有问题的记录（分类、选择）加入的问题",
        metavar="TEXT",
    )
    label_names: Mapping[str, str] | None = FORM.option(
        None,
        "what the labels of a classification are called in records, and their order",
        "分类标签在记录中的名称及顺序",
        type=label_map,
        metavar="VALUE=NAME,...",
    )
    answer_as: str = FORM.option(
        AUTO,
        "what the answer of a choice is: the number of an option, its letter or its text; `auto` "
        "tells by the answer, and refuses one that could be two options",
        "选择题答案的形式：选项的编号、字母或文本；`auto` 自动判断，两可时报错",
        choices=(AUTO, "number", "number-from-1", "letter", "text"),
    )
    turns: str = FORM.option(
        "all",
        "replies of a dialogue to learn: each becomes a record, with what precedes it",
        "对话中要学习的回复：每条回复连同之前的内容成为一条记录",
        choices=("all", "last"),
    )
    numbers_as_text: bool = FORM.option(
        False,
        "write numbers, dates and true or false as text; without it they are bad lines",
        "把数字、日期、真假值写成文本；不加则视为坏行",
    )
    join_lists: str | None = FORM.option(
        None,
        "write lists of texts as one text, with this between them (`\\n` is a new line)",
        "把文本列表写成一段文本，以此分隔（`\\n` 为换行）",
        metavar="SEPARATOR",
    )
    transform: str | None = FORM.option(
        None,
        "your Python function that gets each row as read, a dictionary, and returns a row or "
        "record, a list of them, or None to leave it out; your own file only, it is run",
        "您自己的 Python 函数：接收读到的每一行（字典），返回一行或一条记录、它们的列表，"
        "或 None（舍去）；文件会被执行，只用自己的",
        metavar="FILE.py:FUNCTION",
    )
    skip_bad: bool = FORM.option(
        False,
        "leave out bad lines and count them; without it, any bad line stops the conversion and "
        "nothing is written",
        "略过坏行并计数；不加时任何坏行都会中止转换，不写入任何内容",
    )
    eval_share: float | None = SPLIT.option(
        None,
        "split all records into train and eval, with about this share in eval; near-duplicates, "
        "and the records of one dialogue, stay together",
        "把全部记录划分为 train 和 eval，eval 约占此比例；近似重复的记录、同一对话的记录不会分开",
        type=eval_share,
        metavar="SHARE",
    )


@dataclass(frozen=True, kw_only=True)
class ConvertDataOptions(ConversionOptions, CommandOptions):
    """The flags of convert_data.py."""

    script = "convert_data.py"
    description = (
        "Make records from data in the forms of other tools: Alpaca, ShareGPT, OpenAI messages, "
        "questions with answers, classification, choices; as JSON lines, JSON arrays, CSV, TSV, "
        "Excel or Parquet. INPUT/NAME.* becomes OUTPUT/NAME.jsonl. Nothing is written if anything "
        "is wrong."
    )
    chinese = (
        "把其他工具的数据转换为记录：Alpaca、ShareGPT、OpenAI messages、问答、分类、选择；文件可以"
        "是 JSON 行、JSON 数组、CSV、TSV、Excel 或 Parquet。`INPUT/NAME.*` 对应 "
        "`OUTPUT/NAME.jsonl`。只要有错就什么都不写。"
    )
    groups = (FILES, FORM, SPLIT)
    hints = hints.CONVERT_DATA

    input: str = FILES.option(
        REQUIRED,
        "a file, or a folder of files: `.jsonl`, `.json`, `.csv`, `.tsv`, `.xlsx`, `.parquet`",
        "一个文件或文件夹：`.jsonl`、`.json`、`.csv`、`.tsv`、`.xlsx`、`.parquet`",
        metavar="PATH",
    )
    output: str = FILES.option(
        REQUIRED, "folder for the records", "存放记录的文件夹", metavar="FOLDER"
    )
    escape: bool = FILES.option(
        False,
        "treat the texts of data that are records already as plain text, as "
        "preprocess_dataset.py does; all other forms are plain text anyway",
        "数据已是记录时，也把文本当作普通文本，与 preprocess_dataset.py 相同；"
        "其他形式本来就是普通文本",
    )
    overwrite: bool = FILES.option(False, "replace existing files", "覆盖已有的文件")
    seed: int = SPLIT.option(1234, "random seed of the split", "划分的随机种子", type=whole_number)
