"""The flags of finetune_cpm_bee.py. Imports nothing heavy: `--help` must be quick.

The flags for model, data and delta are in `ModelOptions`, which `Options` extends.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

from cpm_bee import hints
from cpm_bee.cli import comma_list, not_negative, positive, real_number, whole_number
from cpm_bee.options import GENERAL, CommandOptions, Group
from cpm_bee.train.model_options import AUTO, DATA, DELTA, MODEL, ModelOptions, above_zero
from cpm_bee.train.schedules import STYLES
from cpm_bee.train.training_state import LOSS, METRICS

DDP, FSDP = "ddp", "fsdp"  # --parallel, or AUTO
ALWAYS, NEVER = "always", "never"  # --resume, or AUTO, or the path of a state
CURVES, TABLES, NO_REPORT = "curves", "tables", "none"  # --report
TENSORBOARD = "tensorboard"
LOGGERS = (TENSORBOARD, "wandb", "swanlab", "trackio")  # --report-to

TRAINING = Group("training", "训练")
SCHEDULE = Group("learning rate", "学习率")
EVALUATION = Group("evaluation and saving", "评测与保存")
REPORT = Group("report and logs", "报告与日志")
MACHINE = Group("machine", "运行环境")


def _loggers(text: str) -> tuple[str, ...]:
    names = comma_list(text)
    for name in names:
        if name not in LOGGERS:
            known = ", ".join(LOGGERS)
            raise argparse.ArgumentTypeError(f"{name!r} is no logger; there are {known}")
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions, CommandOptions):
    """The flags of finetune_cpm_bee.py."""

    script = "finetune_cpm_bee.py"
    description = (
        "Fine-tune a CPM-Bee model, by delta tuning (LoRA) or in full. Runs as one process, or as "
        "several under torchrun."
    )
    chinese = (
        "微调 CPM-Bee 模型，可做增量微调（LoRA）或全参数微调。"
        "可单进程运行，也可用 torchrun 以多进程运行。"
    )
    groups: ClassVar[tuple[Group, ...]] = (
        MODEL,
        DATA,
        DELTA,
        TRAINING,
        SCHEDULE,
        EVALUATION,
        REPORT,
        MACHINE,
    )
    hints = hints.FINETUNE

    epoch: int = TRAINING.option(1, "passes over the training set", "训练轮数", type=positive)
    max_steps: int | None = TRAINING.option(
        None, "stop after this many steps", "达到此步数即停止", type=positive
    )
    batch_size: int = TRAINING.option(
        32,
        "rows (of `--max-length` tokens) in a micro-batch of one process",
        "每个进程的微批行数（每行 `--max-length` 个 token）",
        type=positive,
    )
    accumulate: int = TRAINING.option(
        1,
        "gradient accumulation: micro-batches per step",
        "梯度累积：每步包含的微批数",
        type=positive,
    )
    max_tokens: int | None = TRAINING.option(
        None,
        "maximum number of tokens to compute at once: larger micro-batches are split, which gives "
        "the same result in less memory; a longer record is computed by itself",
        "一次计算的最大 token 数：更大的微批会被拆分，结果相同、内存更少；超长的单条记录单独计算",
        type=positive,
    )
    weight_decay: float = TRAINING.option(
        1e-2, "decoupled weight decay (AdamW)", "解耦的权重衰减（AdamW）", type=real_number(0)
    )
    clip_grad: float = TRAINING.option(
        1.0,
        "maximum global norm, to which the gradient is clipped",
        "梯度裁剪：全局范数的上限",
        type=above_zero,
    )
    loss_scale: float = TRAINING.option(
        1_048_576.0,
        "initial loss scale (fp16 only)",
        "初始 loss scale（仅 fp16）",
        type=above_zero,
    )
    loss_scale_factor: float = TRAINING.option(
        2.0,
        "the loss scale is divided by this on overflow and multiplied by it to grow",
        "溢出时 loss scale 除以该值，增大时乘以该值",
        type=real_number(1, exclusive=True),
    )
    loss_scale_steps: int = TRAINING.option(
        512,
        "steps without overflow before the loss scale grows",
        "连续多少步无溢出后增大 loss scale",
        type=positive,
    )
    seed: int = TRAINING.option(
        1234,
        "random seed for data order, initial values and dropout",
        "数据顺序、初始值和 dropout 的随机种子",
        type=whole_number,
    )

    lr: float = SCHEDULE.option(
        1e-4,
        "base learning rate, which the schedule scales",
        "基础学习率，按学习率调度缩放",
        type=above_zero,
    )
    lr_decay_style: str = SCHEDULE.option("noam", "schedule", "学习率调度", choices=STYLES)
    warmup_iters: int = SCHEDULE.option(
        100,
        "number of warm-up steps; the first step has rate 0",
        "预热步数；第一步的学习率为 0",
        type=not_negative,
    )
    train_iters: int = SCHEDULE.option(
        1_000_000,
        "step at which the schedule ends: from there on, `linear` and `cosine` have rate 0",
        "学习率调度结束的步数：`linear` 和 `cosine` 从这一步起学习率为 0",
        type=positive,
    )
    lr_decay_iters: int | None = SCHEDULE.option(
        None, "overrides `--train-iters`", "覆盖 `--train-iters`", type=positive
    )
    start_step: int = SCHEDULE.option(
        0,
        "step of the schedule at which the run begins",
        "训练开始时所处的调度步数",
        type=not_negative,
    )

    eval_interval: int = EVALUATION.option(
        500, "steps between evaluations", "评测间隔（步）", type=positive
    )
    early_stop_patience: int = EVALUATION.option(
        5,
        "stop after this many evaluations in a row that are not the best so far",
        "连续多少次评测都没有刷新最好结果就提前停止",
        type=positive,
    )
    metric_for_best: str = EVALUATION.option(
        LOSS,
        "which evaluation is the best one, for the best weights and for `--early-stop-patience`: "
        "that with the lowest `loss`, or with the highest `exact_match` and, of equal ones, the "
        "lowest loss",
        "哪次评测算最好（用于最优权重和 `--early-stop-patience`）：`loss` 最低者，或 "
        "`exact_match` 最高者（相同时取损失较低者）",
        choices=METRICS,
    )
    inspect_iters: int = EVALUATION.option(
        1000,
        "steps between printed statistics of the trained tensors",
        "打印被训练张量统计量的间隔（步）",
        type=positive,
    )
    save: str = EVALUATION.option("results", "output folder", "输出文件夹", metavar="FOLDER")
    save_name: str = EVALUATION.option(
        "cpm_bee_finetune", "prefix of the output files", "输出文件名的前缀", metavar="NAME"
    )
    save_interval: int | None = EVALUATION.option(
        None,
        "steps between saved training states; `--eval-interval` when not given",
        "保存训练状态的间隔（步）；不指定时等于 `--eval-interval`",
        type=positive,
    )
    save_minutes: float | None = EVALUATION.option(
        None,
        "also save the training state when this many minutes have passed since it was last saved",
        "距上次保存训练状态满这么多分钟时，也保存一次",
        type=above_zero,
    )
    save_total_limit: int = EVALUATION.option(
        2,
        "number of training states to keep: the newest in `SAVE_NAME-state.pt`, earlier ones in "
        "`SAVE_NAME-state-STEP.pt`; the best weights are always kept",
        "保留多少个训练状态：最新的为 `SAVE_NAME-state.pt`，较早的为 `SAVE_NAME-state-STEP.pt`；"
        "最优权重总会保留",
        type=positive,
    )
    keep_runs: int = EVALUATION.option(
        1,
        "finished earlier runs of the same name to keep, in `SAVE_NAME-previous`, "
        "`SAVE_NAME-previous-2`, ...; the latest earlier run is always kept",
        "保留多少次同名的、已完成的旧运行（`SAVE_NAME-previous`、`SAVE_NAME-previous-2` 等）；"
        "最近一次旧运行总会保留",
        type=positive,
    )
    resume: str = EVALUATION.option(
        NEVER,
        "continue from a training state: `--resume` alone from the newest one in `--save`, which "
        "must exist; `auto` from that one if there is one of this run with these settings, else "
        "from the beginning; a path from that file, and the files of the present run are moved as "
        "by a new one; `never` always begins anew",
        "从训练状态继续：只写 `--resume` 表示从 `--save` 中最新的状态继续，且该状态必须存在；"
        "`auto` 表示若有设置相同的状态就从它继续，否则从头开始；给出路径则从该文件继续，"
        "此时当前运行的文件会像开始新运行那样移走；`never` 总是从头开始",
        metavar="auto|never|PATH",
        bare=ALWAYS,
    )
    report: str = REPORT.option(
        CURVES,
        "a page about the run, `SAVE_NAME-report.html`: `curves` (which need the extra: "
        '`python -m pip install -e ".[report]"`; without it there are tables), only `tables`, or '
        "`none`",
        "关于本次训练的网页 `SAVE_NAME-report.html`：带曲线（`curves`，需安装附加依赖："
        '`python -m pip install -e ".[report]"`，否则只有表格）、只有表格（`tables`）'
        "或不生成（`none`）",
        choices=(CURVES, TABLES, NO_REPORT),
    )
    log_interval: int = REPORT.option(
        10,
        "steps between printed lines, where there is no terminal for a progress bar; the log file "
        "has every step",
        "没有终端显示进度条时，打印训练步的间隔（步）；日志文件记录每一步",
        type=positive,
    )
    report_to: tuple[str, ...] = REPORT.option(
        (),
        "loggers that also get the figures, separated by commas: `tensorboard`, `wandb`, "
        "`swanlab`, `trackio`; each needs the extra of its name, such as "
        '`python -m pip install -e ".[wandb]"`',
        "同时把数值发给哪些记录工具，用逗号分隔：`tensorboard`、`wandb`、`swanlab`、`trackio`；"
        '各需安装同名附加依赖，如 `python -m pip install -e ".[wandb]"`',
        type=_loggers,
        metavar="NAMES",
    )
    task_name: str = REPORT.option(
        "task", "name of the task in the logs", "日志中的任务名", metavar="NAME"
    )
    tensorboard: str | None = REPORT.option(
        None,
        "write TensorBoard events to this folder; with `--report-to tensorboard` alone they go to "
        "`SAVE_NAME-tensorboard` in `--save` (needs the extra: "
        '`python -m pip install -e ".[tensorboard]"`)',
        "向该文件夹写入 TensorBoard 事件；只写 `--report-to tensorboard` 时写入 `--save` 中的 "
        "`SAVE_NAME-tensorboard`（需安装附加依赖："
        '`python -m pip install -e ".[tensorboard]"`）',
        metavar="FOLDER",
    )

    engine: str = MACHINE.option(
        AUTO,
        "training engine: `torch`, which is also `auto`, or `bmtrain` (ZeRO-3, on GPUs only; "
        "`python -m pip install --no-deps bmtrain==1.0.1`, Python 3.10 or 3.11)",
        "训练引擎：`torch`（`auto` 同此），或 `bmtrain`（ZeRO-3，仅限 GPU；"
        "`python -m pip install --no-deps bmtrain==1.0.1`，Python 3.10 或 3.11）",
        choices=(AUTO, "torch", "bmtrain"),
    )
    parallel: str = MACHINE.option(
        AUTO,
        "with several processes: each holds the whole model (`ddp`), or a part of every tensor "
        "(`fsdp`); `auto` is `ddp` where model and optimizer state fit into half of the memory",
        "多进程时：每个进程持有完整模型（`ddp`），或每个张量的一部分（`fsdp`）；"
        "`auto` 在模型与优化器状态放得进一半内存时用 `ddp`",
        choices=(AUTO, DDP, FSDP),
    )
    offload: bool = MACHINE.option(
        False,
        "with `--parallel fsdp`: keep the parts in host memory and copy them to the GPU layer by "
        "layer",
        "与 `--parallel fsdp` 合用：分片放在主机内存，计算时逐层拷到 GPU",
    )
    device: str = MACHINE.option(
        AUTO,
        "`cpu` or `cuda`; `auto` is the GPU if there is one",
        "`cpu` 或 `cuda`；`auto` 在有 GPU 时用 GPU",
        metavar="DEVICE",
    )
    dtype: str = MACHINE.option(
        AUTO,
        "compute type; `auto` is fp32 on a CPU, and bf16 on a GPU (fp16 on those without bf16 "
        "arithmetic, such as V100 and T4)",
        "计算精度；`auto` 在 CPU 上为 fp32，在 GPU 上为 bf16（V100、T4 等没有 bf16 运算的 GPU "
        "上为 fp16）",
        choices=(AUTO, "fp32", "bf16", "fp16"),
    )
    checkpointing: str = MACHINE.option(
        AUTO,
        "`full` recomputes activations in the backward pass, which saves memory and costs time; "
        "`none` keeps them; `auto` is `full` if a step without it is predicted not to fit into "
        "the free memory",
        "激活重计算：`full` 在反向传播时重新计算激活，以时间换内存；`none` 保留激活；"
        "`auto` 预测不重算就放不下空闲内存时才用 `full`",
        choices=(AUTO, "none", "full"),
    )
    attention: str = MACHINE.option(
        AUTO,
        "`sdpa`, which is also `auto`, or `flex` (FlexAttention; it needs a GPU and triton, and is "
        "tried first: where it fails, or where the bias table is trained, the run says so and "
        "uses `sdpa`)",
        "`sdpa`（`auto` 同此），或 `flex`（FlexAttention，需要 GPU 和 triton；使用前先试算："
        "试算失败，或偏置表参与训练时，会给出提示并改用 `sdpa`）",
        choices=(AUTO, "sdpa", "flex"),
    )
    compile: bool = MACHINE.option(
        False, "compile the blocks with `torch.compile`", "用 `torch.compile` 编译各层"
    )
    dry_run: bool = GENERAL.option(
        False,
        "check flags, files and data, print what would run, and stop",
        "检查参数、文件和数据并打印将要运行的内容，然后停止",
    )

    @property
    def schedule_end(self) -> int:
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters
