"""The flags of finetune_cpm_bee.py for base model, data and delta."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from cpm_bee.cli import comma_list, positive, real_number
from cpm_bee.options import REQUIRED, Group, model_config_option, verify_option, vocab_option
from cpm_bee.quantize import CHOICES, NONE

AUTO = "auto"

MODEL = Group("model", "模型")
DATA = Group("data", "数据")
DELTA = Group("delta tuning", "增量微调")

# The probabilities of a distribution may be rounded, as in 0.333,0.333,0.333.
_SUM_TOLERANCE = 0.005


def probabilities(text: str) -> tuple[float, ...]:
    """Converts the probabilities of 0, 1, 2, ... which add up to 1."""
    faults, values = [], []
    for piece in text.split(","):
        try:
            values.append(real_number(0)(piece.strip()))
        except argparse.ArgumentTypeError as error:
            faults.append(str(error))
    if not faults and abs(sum(values) - 1) > _SUM_TOLERANCE:
        faults.append(f"{text} add up to {sum(values):g}, not to 1")
    if faults:
        raise argparse.ArgumentTypeError("; ".join(faults))
    return tuple(values)


above_zero = real_number(0, exclusive=True)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The flags for base model, data and delta."""

    load: str | None = MODEL.option(
        None,
        "base model: a checkpoint file (`.bin`, `.pt`, `.safetensors`), an index of shards, or a "
        "folder with one of them; without it training starts from random weights (which needs "
        "`--model-config FILE` and `--vocab`)",
        "基座模型：检查点文件（`.bin`、`.pt`、`.safetensors`）、分片索引，或包含它们的文件夹；"
        "不指定则从随机权重开始训练（此时需要 `--model-config FILE` 和 `--vocab`）",
        metavar="CHECKPOINT",
    )
    model_config: str = model_config_option(MODEL)
    vocab: str | None = vocab_option(MODEL)
    quantize: str = MODEL.option(
        NONE,
        "hold the frozen base model in 4 bits (`nf4`) or 8 bits (`int8`) per weight; it is "
        "quantized once and cached beside the checkpoint; needs `--use-delta`",
        "以 4 bit（`nf4`）或 8 bit（`int8`）加载冻结的基座模型，只量化一次，结果缓存在检查点旁；"
        "需要 `--use-delta`",
        choices=CHOICES,
    )
    verify: bool = verify_option(MODEL)

    dataset: str = DATA.option(
        REQUIRED,
        "training set, a folder that `preprocess_dataset.py` made; or several with weights, as "
        "`A=2,B=0.5`: how often each of its records comes in an epoch",
        "训练集，即 `preprocess_dataset.py` 生成的文件夹；或带权重的多个，如 `A=2,B=0.5`："
        "其中每条记录在一轮中出现的次数",
        metavar="FOLDER[=WEIGHT,...]",
    )
    eval_dataset: str | None = DATA.option(
        None,
        "evaluation set; without it there is no evaluation, and the best weights are the last ones",
        "验证集；不指定则不评测，最优权重即最终权重",
        metavar="FOLDER",
    )
    max_length: int = DATA.option(
        512,
        "tokens in a row; records are packed into rows, and longer ones are left out and counted",
        "每行的 token 数；记录打包成行，更长的记录会被排除并计数",
        type=positive,
    )
    incontext_weights: tuple[float, ...] | None = DATA.option(
        None,
        "in-context samples: with the first probability a record is alone, with the second, third, "
        "... it follows 1, 2, ... other records of its dataset, answers included, as many as fit "
        "into `--max-length`; such as `0.7,0.2,0.1`; none when not given",
        "上下文样例：一条记录以第一个概率单独出现，以第二、第三……个概率附带同一数据集中的 1、2……条"
        "其他记录（含答案），以 `--max-length` 放得下为限；如 `0.7,0.2,0.1`；不指定则没有样例",
        type=probabilities,
        metavar="P,P,...",
    )
    drop_last: bool = DATA.option(
        False, "leave out incomplete steps at the end of an epoch", "舍弃每轮末尾不满的步"
    )

    use_delta: bool = DELTA.option(
        False,
        "delta tuning: train only a LoRA; the base model stays frozen",
        "增量微调：只训练 LoRA，基座模型不变",
    )
    init_delta: str | None = DELTA.option(
        None,
        "start from this delta file instead of a new LoRA, with its rank, alpha and layers; the "
        "optimizer and the schedule begin anew; needs `--use-delta`; with `--resume` the saved "
        "state is used instead",
        "从该增量文件开始，而不是新建 LoRA；秩、alpha 和目标层取自该文件，优化器和学习率调度重新"
        "开始；需要 `--use-delta`；与 `--resume` 合用时以保存的训练状态为准",
        metavar="FILE",
    )
    # None: of `--init-delta`, or else the defaults of `DeltaConfig`, so that a flag which
    # contradicts the delta file can be told from one that was not given.
    delta_rank: int | None = DELTA.option(
        None,
        "rank r of the LoRA; 8, or that of `--init-delta`, when not given",
        "LoRA 的秩 r；不指定时为 8，或与 `--init-delta` 相同",
        type=positive,
    )
    delta_alpha: float | None = DELTA.option(
        None,
        "the LoRA is scaled by alpha/r; alpha is 16, or that of `--init-delta`, when not given",
        "LoRA 的缩放系数为 alpha/r；alpha 不指定时为 16，或与 `--init-delta` 相同",
        type=above_zero,
    )
    delta_targets: tuple[str, ...] | None = DELTA.option(
        None,
        "layers that get a LoRA: `project_q`, `project_k`, `project_v`, `attention_out`, `w_0`, "
        "`w_1`, `w_out`; `project_q,project_v`, or those of `--init-delta`, when not given",
        "添加 LoRA 的层：`project_q`、`project_k`、`project_v`、`attention_out`、`w_0`、"
        "`w_1`、`w_out`；不指定时为 `project_q,project_v`，或与 `--init-delta` 相同",
        type=comma_list,
        metavar="LAYER,...",
    )
    delta_dropout: float = DELTA.option(
        0.0, "dropout on the input of the LoRA", "LoRA 输入端的 dropout", type=real_number(0)
    )
