"""Flags of all scripts that answer with a model. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpm_bee import quantize
from cpm_bee.cli import not_negative, positive, real_number, share
from cpm_bee.errors import InputError
from cpm_bee.options import (
    Group,
    check_values,
    model_config_option,
    recorded_alpha_option,
    verify_option,
    vocab_option,
)

FILES = Group("files", "文件")
MODEL = Group("model", "模型")
SEARCH = Group("beam search", "束搜索")
MACHINE = Group("machine", "运行环境")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The flag for the length of answers."""

    max_length: int = SEARCH.option(
        100,
        "maximum number of tokens to write for a record, over all its answers (up to two more are "
        "possible)",
        "每条记录最多生成的 token 数，所有答案合计（可能多出至多两个）",
        type=positive,
    )


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(AnswerOptions):
    """The flags of the beam search.

    Raises:
        InputError: a value is out of range; names the flag.
    """

    beam_size: int | None = SEARCH.option(
        None,
        "number of beams; 1 is greedy decoding; 3 when not given; not with `--temperature`",
        "束的个数；1 为贪心解码；不指定时为 3；不能与 `--temperature` 同用",
        type=positive,
    )
    num_return: int = SEARCH.option(
        1,
        "number of answers to write for a record: the best hypotheses of the beam search, or "
        "independent samples; all are listed under `<candidates>`",
        "每条记录写出的答案数：束搜索中最好的几个，或相互独立的采样；全部列在 `<candidates>` 下",
        type=positive,
    )
    length_penalty: float = SEARCH.option(
        1.0,
        "exponent of the length by which a hypothesis's log probability is divided: larger values "
        "prefer longer answers, 0 is no division",
        "候选的对数概率除以其长度的该次幂：值越大越偏向长答案，0 为不除",
        type=real_number(0),
    )
    # Keskar et al. 2019, CTRL, section 4.1, for logits of either sign.
    repetition_penalty: float = SEARCH.option(
        1.0,
        "a value above 1 makes tokens that were already written less likely: their positive "
        "logits are divided by it and their negative ones multiplied; 1 is no penalty",
        "大于 1 时降低已生成 token 再次出现的概率：正的 logits 除以该值，负的乘以该值；1 为不惩罚",
        type=real_number(0, exclusive=True),
    )
    repetition_window: int | None = SEARCH.option(
        None,
        "number of most recent tokens that the penalty considers; all when not given",
        "重复惩罚回看的 token 数；不指定则为全部",
        type=positive,
    )

    temperature: float | None = SEARCH.option(
        None,
        "draw tokens at random, with their logits divided by this, instead of a beam search; 0 is "
        "greedy decoding",
        "按概率随机采样（logits 除以该值），而不用束搜索；0 为贪心解码",
        type=real_number(0),
    )
    top_k: int | None = SEARCH.option(
        None,
        "draw from the K most probable tokens; needs `--temperature`",
        "只在概率最大的 K 个 token 中采样；需要 `--temperature`",
        type=positive,
    )
    top_p: float | None = SEARCH.option(
        None,
        "draw from the fewest tokens that have this share of the probability; needs "
        "`--temperature`",
        "只在概率之和达到该值的最少 token 中采样；需要 `--temperature`",
        type=share(exclusive=True),
    )
    min_p: float | None = SEARCH.option(
        None,
        "draw from the tokens that have at least this share of the probability of the most "
        "probable one; needs `--temperature`",
        "只在概率不低于最大概率该比例的 token 中采样；需要 `--temperature`",
        type=share(),
    )
    seed: int = SEARCH.option(0, "seed of the samples", "采样的随机种子", type=not_negative)

    def __post_init__(self) -> None:
        check_values(self)
        problems = []
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None and not self.is_sampling:
                problems.append(f"--{name.replace('_', '-')}: needs --temperature above 0")
        if self.beam_size not in (None, 1) and self.temperature is not None:
            problems.append("--beam-size: not used with --temperature; leave one of them out")
        if not self.is_sampling and self.num_return > self.num_beams:
            problems.append(
                f"--num-return {self.num_return}: needs --beam-size {self.num_return} or more, or "
                "--temperature"
            )
        if problems:
            raise InputError("\n".join(problems))

    @property
    def is_sampling(self) -> bool:
        return bool(self.temperature)

    @property
    def num_beams(self) -> int:
        """The number of hypotheses that run side by side: beams, or samples."""
        if self.is_sampling:
            return self.num_return
        return 1 if self.temperature == 0 else self.beam_size or 3


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """The flag for in-context samples."""

    examples: str | None = FILES.option(
        None,
        "few-shot: answered records, one JSON object per line, that the model sees with every "
        "record, as its in-context samples",
        "少样本：带答案的记录文件，每行一个 JSON 对象；模型回答每条记录时都会看到这些上下文示例",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class LoadedModelOptions:
    """The flags for the model that answers, and where it runs."""

    load: str = MODEL.option(
        "ckpts/pytorch_model.bin",
        "checkpoint of the base model, or of a fully fine-tuned one",
        "基座模型的检查点，或全参数微调得到的检查点",
        metavar="CHECKPOINT",
    )
    model_config: str = model_config_option(MODEL)
    vocab: str | None = vocab_option(MODEL)
    delta: str | None = MODEL.option(
        None,
        "delta file that fine-tuning saved; the base model alone when not given",
        "微调保存的增量文件；不指定则只用基座模型",
        metavar="FILE",
    )
    delta_alpha: float | None = recorded_alpha_option(MODEL)
    quantize: str = MODEL.option(
        quantize.NONE,
        "hold the base model in 4 bits (`nf4`) or 8 bits (`int8`) per weight; it is quantized once "
        "and cached beside the checkpoint",
        "以 4 bit（`nf4`）或 8 bit（`int8`）加载基座模型；只量化一次，结果缓存在检查点旁",
        choices=quantize.CHOICES,
    )
    verify: bool = verify_option(MODEL)
    dtype: str = MACHINE.option(
        "auto",
        "compute type; `auto` is fp32 on a CPU, and bf16 on a GPU (fp16 on those without bf16 "
        "arithmetic, such as V100 and T4)",
        "计算精度；`auto` 在 CPU 上为 fp32，在 GPU 上为 bf16（V100、T4 等没有 bf16 运算的 GPU "
        "上为 fp16）",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = MACHINE.option(
        "auto",
        "`cpu`, `cuda` or `cuda:N`; `auto` is the GPU if there is one",
        "`cpu`、`cuda` 或 `cuda:N`；`auto` 在有 GPU 时用 GPU",
        metavar="DEVICE",
    )

    max_tokens: int | None = MACHINE.option(
        None,
        "number of tokens to hold in memory at once, of which a record needs those of its prompt "
        "and `--max-length` for each beam; records are generated together as far as they fit, one "
        "at least. It does not change the answers. When not given, what a quarter of the free "
        "memory holds",
        "同时保存在内存中的 token 数；每条记录占用其提示的 token 数，再加上每个束各 `--max-length` "
        "个。放得下的记录一起生成，至少一条。不影响答案。不指定时为四分之一可用内存所能容纳的数目",
        type=positive,
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.delta_alpha is not None and self.delta is None:
            raise InputError("--delta-alpha: needs --delta")

    def model_files(self) -> Iterator[str | Path]:
        """The files of the model, as far as they are known before they are opened."""
        given = (self.load, self.model_config, self.vocab, self.delta)
        yield from (path for path in given if path is not None)
        yield from (Path(path).with_suffix(".json") for path in (self.load, self.delta) if path)
        load = Path(self.load)
        folder = load if load.is_dir() else load.parent
        for pattern in (
            "*.bin",
            "*.pt",
            "*.safetensors",
            "*.index.json",
            "config.json",
            "vocab.txt",
        ):
            yield from folder.glob(pattern)
