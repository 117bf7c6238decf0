"""The flags of evaluate.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import not_negative, positive
from cpm_bee.errors import InputError
from cpm_bee.generate.options import (
    FILES,
    MACHINE,
    MODEL,
    SEARCH,
    AnswerOptions,
    ExampleOptions,
    LoadedModelOptions,
)
from cpm_bee.options import REQUIRED, CommandOptions, Group, keep_option

EVALUATION = Group("evaluation", "评测")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AnswerOptions, ExampleOptions, LoadedModelOptions, CommandOptions):
    """The flags of evaluate.py."""

    script = "evaluate.py"
    description = (
        "Evaluate a model on records with answers: exact match, choice accuracy with a confusion "
        "table, token accuracy, perplexity, and BLEU, chrF and ROUGE-L for free text, each with a "
        "95 % bootstrap interval. With --baseline it also compares the delta with the base "
        "model on the same records, and says what the difference means."
    )
    chinese = (
        "在带答案的记录上评测模型：完全一致率、选择题准确率与混淆矩阵、token 准确率、困惑度，"
        "自由文本另有 BLEU、chrF 和 ROUGE-L，均附 95 % 自助法（bootstrap）置信区间。"
        "加上 `--baseline` 会在同样的记录上与基座模型比较，并说明差异是否可信。"
    )
    groups = (FILES, MODEL, EVALUATION, SEARCH, MACHINE)
    hints = hints.EVALUATE

    dataset: str = FILES.option(
        REQUIRED,
        "records with answers: a folder that `preprocess_dataset.py` made, or a file with one "
        "JSON object per line; `-` is standard input",
        "带答案的记录：`preprocess_dataset.py` 生成的文件夹，或每行一个 JSON 对象的文件；"
        "`-` 为标准输入",
        metavar="PATH",
    )
    output: str | None = FILES.option(
        None,
        "folder for `results_DATE.json` and `samples_NAME_DATE.jsonl`, in the layout of "
        "lm-evaluation-harness; only the table is printed when not given",
        "存放 `results_DATE.json` 和 `samples_NAME_DATE.jsonl` 的文件夹（lm-evaluation-harness "
        "的格式）；不指定则只打印表格",
        metavar="FOLDER",
    )
    escape: bool = FILES.option(
        False,
        "treat all texts of a file as plain text, as in preprocess_dataset.py",
        "把文件中的所有文本当作普通文本，与 preprocess_dataset.py 相同",
    )
    keep: tuple[str, ...] = keep_option(FILES)
    baseline: bool = EVALUATION.option(
        False,
        "also evaluate the base model without the delta, and compare; needs `--delta`",
        "同时评测不带增量的基座模型并比较；需要 `--delta`",
    )
    by: str | None = EVALUATION.option(
        None,
        "also show exact match for each value of this field, of the record or of `--keep`",
        "另按该字段（记录中的或 `--keep` 的）的每个取值给出完全一致率",
        metavar="FIELD",
    )
    errors: int = EVALUATION.option(
        0,
        "show the N records whose right answer has the largest loss, with the model's answer: "
        "wrong labels tend to be among the first",
        "显示正确答案损失最大的 N 条记录及模型的答案：标注错误往往排在最前",
        type=not_negative,
    )
    train_dataset: str | None = EVALUATION.option(
        None,
        "training set, a folder or a file as `--dataset`: names near-duplicates of its records",
        "训练集（文件夹或文件，同 `--dataset`）：列出与训练集近似重复的记录",
        metavar="PATH",
    )
    limit: int | None = EVALUATION.option(
        None, "evaluate only the first N records", "只评测前 N 条记录", type=positive
    )
    seed: int = EVALUATION.option(
        0, "seed of the bootstrap samples", "自助法抽样的随机种子", type=not_negative
    )

    def __post_init__(self) -> None:
        LoadedModelOptions.__post_init__(self)
        if self.baseline and self.delta is None:
            raise InputError("--baseline: needs --delta, it compares the delta with the base model")
