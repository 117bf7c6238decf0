"""The flags of finetune_cpm_bee.py. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from cpm_bee import quantize
from cpm_bee.cli import (
    ArgumentParser,
    comma_list,
    not_negative,
    positive,
    real_number,
    whole_number,
)
from cpm_bee.train.schedules import STYLES

PARALLEL = AUTO, DDP, FSDP = ("auto", "ddp", "fsdp")  # --parallel


@dataclass(frozen=True)
class Options:
    """One field a flag; the meanings stand in `parser`."""

    model_config: str
    load: str | None
    vocab: str | None
    quantize: str
    dataset: str
    eval_dataset: str | None
    max_length: int
    drop_last: bool
    use_delta: bool
    delta_rank: int
    delta_alpha: float
    delta_targets: tuple[str, ...]
    delta_dropout: float
    epoch: int
    max_steps: int | None
    batch_size: int
    accumulate: int
    max_tokens: int | None
    lr: float
    lr_decay_style: str
    warmup_iters: int
    train_iters: int
    lr_decay_iters: int | None
    start_step: int
    weight_decay: float
    clip_grad: float
    loss_scale: float
    loss_scale_factor: float
    loss_scale_steps: int
    seed: int
    eval_interval: int
    early_stop_patience: int
    inspect_iters: int
    save: str
    save_name: str
    save_interval: int | None
    resume: bool
    task_name: str
    tensorboard: str | None
    engine: str
    device: str
    dtype: str
    checkpointing: str
    attention: str
    compile: bool
    parallel: str
    offload: bool
    dry_run: bool

    @property
    def schedule_end(self) -> int:
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> Options:
        values = vars(parser().parse_args(arguments))
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


def parser() -> ArgumentParser:
    result = ArgumentParser(
        prog="finetune_cpm_bee.py",
        description="Fine-tune a CPM-Bee model, by delta tuning (LoRA) or in full. Runs as one "
        "process, or as many under torchrun.",
    )
    _add_model(result.add_argument_group("model"))
    _add_data(result.add_argument_group("data"))
    _add_delta(result.add_argument_group("delta tuning"))
    _add_training(result.add_argument_group("training"))
    _add_watching(result.add_argument_group("evaluation and saving"))
    _add_machine(result.add_argument_group("machine"))
    return result


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model-config", default="auto", help="config file; auto: derive it from the checkpoint")
    add(
        "--load",
        metavar="CHECKPOINT",
        help="base model: .bin, .safetensors, an index of shards "
        "or a folder; without it training starts from random weights",
    )
    add("--vocab", metavar="FILE", help="vocabulary; default: vocab.txt beside the checkpoint")
    add(
        "--quantize",
        choices=quantize.CHOICES,
        default=quantize.NONE,
        help="hold the frozen base in 4 or 8 bit; needs --use-delta. Kept beside the checkpoint",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", required=True, metavar="FOLDER", help="training set, bin_data/NAME")
    add("--eval-dataset", metavar="FOLDER", help="evaluation set")
    add(
        "--max-length",
        type=positive,
        default=512,
        help="tokens of a row; longer records are left out and counted",
    )
    add("--drop-last", action="store_true", help="leave out an epoch's last, incomplete steps")


def _add_delta(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-delta", action="store_true", help="train a LoRA only, the base stays as it is")
    add("--delta-rank", type=positive, default=8, help="rank r")
    add("--delta-alpha", type=real_number(0, exclusive=True), default=16.0, help="scale is alpha/r")
    add(
        "--delta-targets",
        type=comma_list,
        default="project_q,project_v",
        metavar="LAYER,...",
        help="layers that carry a LoRA: project_q, project_k, project_v, "
        "attention_out, w_0, w_1, w_out",
    )
    add("--delta-dropout", type=real_number(0), default=0.0, help="dropout before the LoRA")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    above_zero = real_number(0, exclusive=True)
    add("--epoch", type=positive, default=1, help="passes over the training set")
    add("--max-steps", type=positive, help="stop after this many steps")
    add("--batch-size", type=positive, default=32, help="rows of max-length tokens a step and rank")
    add("--accumulate", type=positive, default=1, help="micro-steps of batch-size rows a step")
    add(
        "--max-tokens",
        type=positive,
        help="tokens computed at once: larger micro-steps are split, with the same result in less "
        "memory; a longer record stands alone",
    )
    add("--lr", type=above_zero, default=1e-4, help="start learning rate")
    add("--lr-decay-style", choices=STYLES, default="noam", help="schedule")
    add("--warmup-iters", type=not_negative, default=100, help="steps of warm-up")
    add("--train-iters", type=positive, default=1_000_000, help="step at which the schedule ends")
    add("--lr-decay-iters", type=positive, help="overrides --train-iters")
    add("--start-step", type=not_negative, default=0, help="where in the schedule to begin")
    add("--weight-decay", type=real_number(0), default=1e-2, help="decoupled (AdamW)")
    add("--clip-grad", type=above_zero, default=1.0, help="largest global norm of the gradient")
    add("--loss-scale", type=above_zero, default=1_048_576.0, help="first loss scale (fp16 only)")
    add(
        "--loss-scale-factor",
        type=real_number(1, exclusive=True),
        default=2.0,
        help="the scale shrinks by it on overflow and grows by it",
    )
    add("--loss-scale-steps", type=positive, default=512, help="good steps until the scale grows")
    add("--seed", type=whole_number, default=1234, help="of order, initial values and dropout")


def _add_watching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-interval", type=positive, default=500, help="steps between evaluations")
    add(
        "--early-stop-patience",
        type=positive,
        default=5,
        help="evaluations without a lower loss after which training stops",
    )
    add(
        "--inspect-iters",
        type=positive,
        default=1000,
        help="steps between printed statistics of the trained tensors",
    )
    add("--save", default="results", metavar="FOLDER", help="where the run writes")
    add("--save-name", default="cpm_bee_finetune", help="first part of the names of its files")
    add("--save-interval", type=positive, help="steps between saved states; default: eval-interval")
    add("--resume", action="store_true", help="go on from the state saved in --save")
    add("--task-name", default="task", help="name of the task in the logs")
    add("--tensorboard", metavar="FOLDER", help="also write TensorBoard events there")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--engine", choices=("auto", "torch", "bmtrain"), default="auto", help="training engine")
    add(
        "--parallel",
        choices=PARALLEL,
        default=AUTO,
        help="with several processes: each has the whole model (ddp) or a part of every tensor "
        "(fsdp); auto: ddp where the model fits into half of the memory",
    )
    add("--offload", action="store_true", help="with --parallel fsdp: keep the parts on the host")
    add("--device", default="auto", help="cpu, cuda or auto")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="compute type; auto: fp32 on a CPU, bf16 (else fp16) on a GPU",
    )
    add(
        "--checkpointing",
        choices=("auto", "none", "full"),
        default="auto",
        help="compute activations again in the backward pass; auto: where a step without it is "
        "predicted not to fit into free memory",
    )
    add(
        "--attention",
        choices=("auto", "sdpa", "flex"),
        default="auto",
        help="FlexAttention needs a GPU and triton; auto: flex where it can be",
    )
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--dry-run", action="store_true", help="check flags, paths and files, and train nothing")
