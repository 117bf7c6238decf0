"""Other tools' names for our flags, so that the error for an unknown flag can suggest ours.

Each table maps a flag here to names with the same meaning elsewhere: in the trainers of Hugging
Face and of the tools built on it, in Megatron-LM, DeepSpeed, Lightning and llama.cpp. A script's
table has a name only if that script has a flag with that meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

_MODEL = {
    "--load": "model-name-or-path model-path model-name model base-model pretrained-model "
    "pretrained-model-name-or-path",
    "--model-config": "config-name config-file",
    "--vocab": "tokenizer tokenizer-name tokenizer-path tokenizer-name-or-path vocab-file",
    "--quantize nf4": "load-in-4bit use-4bit bnb-4bit-quant-type quantization-bit quant-bits",
    "--quantize int8": "load-in-8bit use-8bit",
    "--dtype bf16": "bf16 bfloat16",
    "--dtype fp16": "fp16 half",
    "--dtype": "torch-dtype precision mixed-precision compute-dtype",
    "--device cpu": "cpu use-cpu no-cuda",
}

_FINETUNE = _MODEL | {
    "--dataset": "train-file train-data train-data-path train-dataset data data-dir data-path "
    "dataset-dir dataset-name dataset-path interleave-probs interleave-prob",
    "--eval-dataset": "validation-file validation-data eval-file eval-data eval-data-path "
    "val-data val-dataset valid-data dev-file",
    "--max-length": "cutoff-len max-seq-length max-seq-len max-len seq-length seq-len block-size "
    "model-max-length context-length",
    "--drop-last": "dataloader-drop-last",
    "--use-delta": "delta use-lora lora use-peft peft finetuning-type train-type tuner-type",
    "--delta-rank": "lora-rank lora-r lora-dim r",
    "--delta-alpha": "lora-alpha",
    "--delta-targets": "lora-target-modules lora-target lora-targets target-modules",
    "--delta-dropout": "lora-dropout",
    "--epoch": "num-train-epochs num-epochs max-epochs epochs",
    "--max-steps": "max-train-steps num-train-steps max-iters",
    "--batch-size": "per-device-train-batch-size per-gpu-train-batch-size train-batch-size "
    "micro-batch-size train-micro-batch-size-per-gpu",
    "--accumulate": "gradient-accumulation-steps gradient-accumulation grad-accum "
    "grad-accum-steps accumulate-grad-batches",
    "--lr": "learning-rate",
    "--lr-decay-style": "lr-scheduler-type lr-scheduler lr-schedule scheduler",
    "--warmup-iters": "warmup-steps num-warmup-steps lr-warmup-steps lr-warmup-iters",
    "--weight-decay": "wd",
    "--clip-grad": "max-grad-norm clip-grad-norm grad-clip gradient-clipping gradient-clip-val",
    "--loss-scale": "initial-loss-scale",
    "--loss-scale-steps": "loss-scale-window",
    "--seed": "random-seed data-seed",
    "--eval-interval": "eval-steps eval-every eval-freq val-check-interval",
    "--early-stop-patience": "early-stopping-patience patience early-stop-interval",
    "--save": "output-dir output-path output out-dir save-dir save-path",
    "--save-interval": "save-steps save-every save-freq checkpoint-interval checkpointing-steps",
    "--resume": "resume-from-checkpoint resume-from",
    "--task-name": "run-name",
    "--tensorboard": "logging-dir tensorboard-dir",
    "--metric-for-best": "metric-for-best-model best-metric monitor",
    "--log-interval": "logging-steps log-steps log-every log-every-n-steps print-freq",
    "--report-to": "logger loggers log-with tracker",
    "--parallel fsdp": "fsdp deepspeed zero-stage",
    "--parallel ddp": "ddp",
    "--offload": "cpu-offload",
    "--checkpointing full": "gradient-checkpointing activation-checkpointing "
    "checkpoint-activations recompute-activations",
    "--attention": "attn-implementation attn-impl flash-attn use-flash-attn",
    "--compile": "torch-compile",
}

_GENERATE = _MODEL | {
    "--input": "input-file input-path prompt-file prompts-file test-file dataset",
    "--output": "output-file output-path output-dir save",
    "--delta": "adapter adapters adapter-path adapter-name-or-path lora lora-path "
    "lora-weights peft-model",
    "--beam-size": "num-beams beams beam-width",
    "--max-length": "max-new-tokens max-gen-len num-predict",
    "--repetition-penalty": "repeat-penalty",
    "--repetition-window": "repeat-last-n",
    "--instruction": "system-prompt system default-system",
    "--stream": "streaming",
    "--examples": "few-shot fewshot few-shot-file few-shot-examples shots demonstrations demos",
}

_PREPROCESS = {
    "--input": "input-file input-path data-path raw-data dataset",
    "--output-path": "output output-dir output-folder output-prefix out-dir",
    "--output-name": "output-file dataset-name",
    "--vocab": _MODEL["--vocab"],
    "--workers": "num-workers num-proc dataset-num-proc preprocessing-num-workers nproc processes",
    "--seed": "random-seed",
    "--overwrite": "force overwrite-output-dir overwrite-cache",
}

_CONVERSION = {
    "--columns": "column mapping column-mapping columns-mapping",
    "--turns last": "mask-history loss-scale",
    "--eval-share": "val-size split-dataset-ratio test-size validation-split eval-ratio",
    "--encoding": "charset",
    "--sheet": "sheet-name worksheet",
    "--form": "formatting input-format dataset-format",
}

_CONVERT_DATA = _CONVERSION | {
    "--input": _PREPROCESS["--input"],
    "--output": "output-dir output-path output-file out-dir save",
    "--seed": _PREPROCESS["--seed"],
    "--overwrite": _PREPROCESS["--overwrite"],
}
_PREPROCESS |= _CONVERSION

_INSPECT = {
    "--input": _PREPROCESS["--input"],
    "--eval": "eval-dataset validation-file eval-file",
    "--vocab": _MODEL["--vocab"],
    "--max-length": _FINETUNE["--max-length"],
    "--batch-size": _FINETUNE["--batch-size"],
    "--seed": _FINETUNE["--seed"],
    "--show": "samples print-samples num-samples",
    "--html": "report output output-file",
    "--picture": "plot image",
}

_DOCTOR = {
    "--load": _MODEL["--load"],
    "--model-config": _MODEL["--model-config"],
    "--vocab": _MODEL["--vocab"],
    "--save": _FINETUNE["--save"],
    "--device cpu": _MODEL["--device cpu"],
    "--steps": "only checks tests",
    "--gpu": "cuda full",
    "--json": "report json-file",
}

_PLAN = _FINETUNE | {
    "--processes": "num-processes nproc-per-node num-gpus gpus devices world-size",
    "--json": "json-file",
}

_MERGE = {
    "--load": _MODEL["--load"],
    "--vocab": _MODEL["--vocab"],
    "--delta": _GENERATE["--delta"],
    "--output": "output-dir output-path output-file out-dir save save-dir export-dir",
    "--overwrite": _PREPROCESS["--overwrite"],
    "--shard-size": "max-shard-size export-size shard-max-size",
}

_CONVERT = {name: _MERGE[name] for name in ("--vocab", "--output", "--overwrite", "--shard-size")}
_CONVERT |= {
    "--input": "input-dir input-path input-file checkpoint checkpoint-path model model-path",
    "--to": "output-format target-format export-format outtype",
    "--load": "base-model base-model-name-or-path base-model-path pretrained-model",
}


_EVALUATE = _MODEL | {
    "--dataset": "input input-file eval-dataset validation-file test-file tasks data-path",
    "--output": "output-path output-dir save",
    "--delta": _GENERATE["--delta"],
    "--max-length": _GENERATE["--max-length"],
    "--examples": _GENERATE["--examples"],
    "--train-dataset": "train-file train-data",
    "--limit": "max-samples max-eval-samples num-samples",
}

_SERVE = _MODEL | {
    "--delta": _GENERATE["--delta"],
    "--host": "server-name address bind listen-host ip",
    "--port": "server-port listen-port",
    "--allowed-hosts": "trusted-hosts host-whitelist",
    "--served-model-name": "alias model-id",
    "--beam-size": _GENERATE["--beam-size"],
    "--max-length": _GENERATE["--max-length"],
    "--max-answer-tokens": "max-total-tokens n-predict",
    "--max-prompt-tokens": "max-model-len max-input-length max-input-tokens ctx-size n-ctx",
    "--max-waiting": "max-num-seqs max-concurrent-requests max-queued-requests",
    "--max-tokens": "max-num-batched-tokens max-batch-total-tokens",
    "--grace": "timeout-graceful-shutdown shutdown-timeout",
}

_VERIFY = {
    "--load": _MODEL["--load"],
    "--vocab": _MODEL["--vocab"],
    "--model-config": _MODEL["--model-config"],
    "--dataset": _FINETUNE["--dataset"],
    "--eval-dataset": _FINETUNE["--eval-dataset"],
    "--steps": "max-steps num-steps max-train-steps",
    "--threads": "num-threads nthreads",
}


def _by_foreign_flag(table: Mapping[str, str]) -> dict[str, str]:
    return {f"--{name}": ours for ours, names in table.items() for name in names.split()}


# Flag of another tool, with hyphens -> what to write here.
FINETUNE = _by_foreign_flag(_FINETUNE)
GENERATE = _by_foreign_flag(_GENERATE)
SERVE = _by_foreign_flag(_SERVE)
EVALUATE = _by_foreign_flag(_EVALUATE)
PREPROCESS = _by_foreign_flag(_PREPROCESS)
CONVERT_DATA = _by_foreign_flag(_CONVERT_DATA)
INSPECT = _by_foreign_flag(_INSPECT)
PLAN = _by_foreign_flag(_PLAN)
DOCTOR = _by_foreign_flag(_DOCTOR)
VERIFY = _by_foreign_flag(_VERIFY)
MERGE = _by_foreign_flag(_MERGE)
CONVERT = _by_foreign_flag(_CONVERT)
