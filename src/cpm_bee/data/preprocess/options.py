"""The flags of preprocess_dataset.py."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import positive, whole_number
from cpm_bee.data.bin_dataset import BLOCK_SIZE
from cpm_bee.data.forms.options import FORM, SPLIT, ConversionOptions
from cpm_bee.options import REQUIRED, CommandOptions, Group

FILES = Group("files", "文件")
PROCESSING = Group("processing", "处理")

NO_VOCABULARY = "none"  # --vocab


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(ConversionOptions, CommandOptions):
    """The flags of preprocess_dataset.py."""

    script = "preprocess_dataset.py"
    description = (
        "Make binary datasets from records: INPUT/NAME.jsonl becomes OUTPUT_PATH/NAME/. Every "
        "record is checked before anything is written, and the records are shuffled. The same "
        "pass tokenizes them (the token index), so that training can start at once."
    )
    chinese = (
        "由记录生成二进制数据集：`INPUT/NAME.jsonl` 对应 `OUTPUT_PATH/NAME/`。先检查全部记录，"
        "确认无误才写入，并打乱顺序；同时生成 token 索引，训练可以立即开始。"
    )
    groups = (FILES, PROCESSING, FORM, SPLIT)
    hints = hints.PREPROCESS

    input: str = FILES.option(
        REQUIRED,
        "folder with `*.jsonl` files of records, or one such file; or data in another form, which "
        "is recognised as `convert_data.py` does",
        "含有 `*.jsonl` 记录文件的文件夹，或单个文件；也可以是其他形式的数据，"
        "识别方式同 `convert_data.py`",
        metavar="PATH",
    )
    output_path: str = FILES.option(
        REQUIRED,
        "folder for the datasets; each becomes a folder in it",
        "存放数据集的文件夹，每个数据集是其中的一个文件夹",
        metavar="FOLDER",
    )
    output_name: str = FILES.option(
        REQUIRED,
        "name of the data file in each dataset",
        "每个数据集中数据文件的名字",
        metavar="NAME",
    )
    escape: bool = FILES.option(
        False,
        "treat all texts as plain text: each literal `<` (HTML, C++) becomes `<<`, except in "
        "`<mask_N>`, `<option_N>` and tokens that are keys of the record",
        "把所有文本当作普通文本：每个字面的 `<`（HTML、C++）变为 `<<`，但 `<mask_N>`、`<option_N>` "
        "以及作为记录键名的 token 保持不变",
    )
    overwrite: bool = FILES.option(False, "replace existing datasets", "覆盖已有的数据集")
    vocab: str | None = PROCESSING.option(
        None,
        "vocabulary of the model, for the token index; `none` leaves the index to the first "
        "training run; that of the base model in `src/ckpts` when not given",
        "模型的词表，用于生成 token 索引；`none` 表示不生成，留待首次微调时生成；"
        "不指定时用 `src/ckpts` 中基座模型的词表",
        metavar="FILE",
    )
    workers: int | None = PROCESSING.option(
        None,
        "number of processes, which does not change the result; the number of available cores "
        "when not given",
        "进程数，不影响结果；不指定时为本进程可用的核数",
        type=positive,
    )
    seed: int = PROCESSING.option(
        1234,
        "random seed of the shuffle and the split; the same input and seed give the same bytes",
        "打乱顺序和划分的随机种子；输入和种子相同，输出就逐字节相同",
        type=whole_number,
    )
    block_size: int = PROCESSING.option(
        BLOCK_SIZE,
        "size of a block of the data file in bytes, which also limits the size of a record",
        "数据文件每块的字节数，也是单条记录的大小上限",
        type=positive,
    )
