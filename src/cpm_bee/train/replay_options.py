"""The flags of verify.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_bee import hints
from cpm_bee.cli import positive
from cpm_bee.options import REQUIRED, CommandOptions, Group

REPLAY = Group("replay", "重放")
PLACES = Group("files that are elsewhere now", "位置已改变的文件")


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(CommandOptions):
    """The flags of verify.py."""

    script = "verify.py"
    description = (
        "Verify a run by its receipt: compare inputs, code and environment with those of the run, "
        "do its first steps again on the CPU, and say whether losses and trained tensors agree bit "
        "for bit or, if not, from which step on and by how much they differ."
    )
    chinese = (
        "根据回执核对一次训练：把输入、代码和环境与当时比较，在 CPU 上重做最初的若干步，说明损失和"
        "被训练的张量是否逐位一致；若不一致，说明从哪一步开始、相差多少。"
    )
    groups = (REPLAY, PLACES)
    hints = hints.VERIFY

    receipt: str = REPLAY.option(
        REQUIRED,
        "the receipt, `SAVE_NAME-receipt.json`; the log is read from beside it",
        "回执 `SAVE_NAME-receipt.json`；日志从它旁边读取",
        metavar="RECEIPT",
        positional=True,
    )
    steps: int = REPLAY.option(
        10, "steps to do again, at most those of the run", "重做的步数，不超过训练的步数",
        type=positive,
    )  # fmt: skip
    threads: int | None = REPLAY.option(
        None,
        "threads; as many as the run had when not given, since another number rounds differently",
        "线程数；不指定时与当时相同，因为不同的线程数会有不同的舍入",
        type=positive,
    )
    load: str | None = PLACES.option(
        None,
        "base model, if it is not where the run found it",
        "基座模型（若已不在训练时的位置）",
        metavar="CHECKPOINT",
    )
    vocab: str | None = PLACES.option(
        None, "vocabulary, likewise", "词表，同上", metavar="FILE"
    )  # fmt: skip
    model_config: str | None = PLACES.option(
        None, "config file of the model, likewise", "模型配置文件，同上", metavar="FILE"
    )
    dataset: str | None = PLACES.option(
        None,
        "training set, likewise; several with the weights of the run, as `A=2,B=0.5`",
        "训练集，同上；多个训练集连同训练时的权重，如 `A=2,B=0.5`",
        metavar="FOLDER[=WEIGHT,...]",
    )
    eval_dataset: str | None = PLACES.option(
        None, "evaluation set, likewise", "验证集，同上", metavar="FOLDER"
    )
    init_delta: str | None = PLACES.option(
        None, "delta that the run began with, likewise", "训练开始时的增量，同上", metavar="FILE"
    )
