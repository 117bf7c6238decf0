"""Checks of flags that need no file, and of the paths that flags name."""

from __future__ import annotations

from pathlib import Path

from cpm_bee import quantize
from cpm_bee.data.mixture import parts_of
from cpm_bee.errors import InputError, Problems
from cpm_bee.paths import (
    not_a_file,
    not_a_file_or_folder,
    not_a_folder,
    unwritable_folder,
)
from cpm_bee.train.loggers import missing_loggers
from cpm_bee.train.options import AUTO, FSDP, NEVER, Options
from cpm_bee.train.training_state import LOSS

MAX_SEED = 2**48


def check_flags(options: Options, num_processes: int, problems: Problems) -> None:
    """Find flags, and combinations of them, that cannot work."""
    if options.load is None and options.use_delta:
        problems.add("--use-delta", "needs a base model (--load CHECKPOINT)")
    if options.load is None and options.verify:
        problems.add("--verify", "needs a base model (--load CHECKPOINT)")
    if options.quantize != quantize.NONE and not options.use_delta:
        problems.add(
            f"--quantize {options.quantize}",
            "needs --use-delta: a quantized base cannot be trained in full",
        )
    if options.init_delta is not None and not options.use_delta:
        problems.add("--init-delta", "needs --use-delta: full fine-tuning has no delta")
    if options.offload and options.parallel != FSDP:
        problems.add("--offload", "needs --parallel fsdp: it keeps the parts in host memory")
    if options.offload and num_processes == 1:
        problems.add("--offload", "needs several processes (torchrun): one has no parts to keep")
    if options.delta_dropout >= 1:
        problems.add("--delta-dropout", "must be less than 1")
    if abs(options.seed) >= MAX_SEED:
        problems.add(f"--seed {options.seed}", "must be less than 2**48")
    for flag, extra in missing_loggers(options):
        problems.add(flag, extra)
    if options.metric_for_best != LOSS and options.eval_dataset is None:
        problems.add(f"--metric-for-best {options.metric_for_best}", "needs --eval-dataset")
    for flag, folder in (("--save", options.save), ("--tensorboard", options.tensorboard)):
        if folder is not None and (reason := unwritable_folder(folder)):
            problems.add(f"{flag} {folder}", reason)
    if options.save_name != Path(options.save_name).name or not options.save_name:
        problems.add(f"--save-name {options.save_name}", "must be a name; the folder is --save")


def check_paths(options: Options, problems: Problems) -> set[str]:
    """Find the paths that do not exist; returns the flags that name them."""
    missing = set()

    def require(flag: str, path: str, reason: str | None, remedy: str = "") -> None:
        if reason is not None:
            problems.add(f"{flag} {path}", "; ".join(filter(None, [reason, remedy])))
            missing.add(flag)

    for flag, given in data_folders(options).items():
        folders = [given]
        if flag == "--dataset":
            try:
                folders = [part.folder for part in parts_of(given)]
            except InputError as error:
                problems.include(error)
                missing.add(flag)
                continue
        for folder in folders:
            require(flag, folder, not_a_folder(folder), "preprocess_dataset.py makes it")
    if options.load is not None:
        require(
            "--load",
            options.load,
            not_a_file_or_folder(options.load, "checkpoint"),
            "put a CPM-Bee model there, or use the one that comes with this project: "
            "--model-config auto --load ckpts/cpm-bee-tiny",
        )
    config = None if options.model_config == AUTO else options.model_config
    for flag, file in (("--model-config", config), ("--vocab", options.vocab)):
        if file is not None:
            require(flag, file, not_a_file(file))
    if options.init_delta is not None and options.resume == NEVER:  # else a state has the delta
        require("--init-delta", options.init_delta, not_a_file(options.init_delta, "delta file"))
    return missing


def data_folders(options: Options) -> dict[str, str]:
    """Returns the folders of the training set and, if given, the evaluation set, by flag."""
    folders = {"--dataset": options.dataset}
    if options.eval_dataset is not None:
        folders["--eval-dataset"] = options.eval_dataset
    return folders


def torch_only_flags(options: Options) -> list[str]:
    """Returns the given flags that only the torch engine supports."""
    given = {
        "--parallel": options.parallel != AUTO,
        "--offload": options.offload,
        "--compile": options.compile,
    }
    return [flag for flag, was_given in given.items() if was_given]
