"""The flags of doctor.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import comma_list
from cpm_bee.errors import InputError
from cpm_bee.options import CommandOptions, Group, model_config_option, vocab_option

MODEL = Group("model and results", "模型与结果")
STEPS = Group("checks of the GPU code", "GPU 代码检查")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(CommandOptions):
    """The flags of doctor.py."""

    script = "doctor.py"
    description = (
        "Check this machine: Python, PyTorch, driver, memory, disk, threads, and whether a "
        "checkpoint and its vocabulary fit together. Prints a line for each, with the fix where "
        "something is wrong. The exit status is 1 if there is a fault. "
        "`doctor.py explain E201` says what an error code means; without a code it lists all."
    )
    chinese = (
        "检查本机：Python、PyTorch、驱动、内存、磁盘、线程，以及检查点与词表是否匹配。每项一行，"
        "有问题时给出解决办法；存在故障时退出状态为 1。"
        "`doctor.py explain E201` 说明错误代码的含义；不给代码时列出全部。"
    )
    groups = (MODEL, STEPS)
    hints = hints.DOCTOR

    load: str | None = MODEL.option(
        None,
        "checkpoint to check, with its config and vocabulary",
        "要检查的检查点（连同其配置和词表）",
        metavar="CHECKPOINT",
    )
    model_config: str = model_config_option(MODEL)
    vocab: str | None = vocab_option(MODEL)
    save: str = MODEL.option(
        "results",
        "folder where runs will be saved; its disk is checked",
        "微调结果的保存目录，用于检查磁盘",
        metavar="FOLDER",
    )
    json: str | None = MODEL.option(
        None,
        "also write all that was found to this file, for a report",
        "同时把全部结果写入该文件，便于反馈问题",
        metavar="FILE",
    )
    gpu: bool = STEPS.option(
        False,
        "also run the code that needs a GPU, step by step, in less than ten minutes",
        "另外逐步运行需要 GPU 的代码，十分钟以内完成",
    )
    device: str = STEPS.option(
        "cuda",
        "where `--gpu` runs: `cuda`, `cuda:N`, or `cpu` for what can run there",
        "`--gpu` 使用的设备：`cuda`、`cuda:N`，或 `cpu`（只运行 CPU 上可行的部分）",
        metavar="DEVICE",
    )
    steps: tuple[str, ...] | None = STEPS.option(
        None,
        "run only these steps; `--list` shows their names",
        "只运行这些步骤；`--list` 列出名称",
        type=comma_list,
        metavar="STEP,...",
    )
    list: bool = STEPS.option(False, "list the steps of `--gpu`", "列出 `--gpu` 的全部步骤")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InputError(f"--device {self.device}: cpu, cuda and cuda:N can be used")
        if self.steps is not None and not self.gpu:
            raise InputError("--steps: needs --gpu")
        if self.load is None and (self.vocab is not None or self.model_config != "auto"):
            raise InputError("--vocab and --model-config need --load")
