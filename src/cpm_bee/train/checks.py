"""Checks before a run starts: its flags, and all files that they name.

Each process runs them alone, before it waits for others. They read only samples of the weights and
write nothing, with one exception: a run that is not a dry run and has no mistakes so far makes its
quantized base beside the checkpoint. All problems are raised at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpm_bee import quantize
from cpm_bee.checkpoint.config_from_weights import derive_config
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.mixture import Mixture, open_datasets
from cpm_bee.delta import DeltaConfig
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.engine.device import choose_device, choose_dtype
from cpm_bee.engine.select import choose_engine
from cpm_bee.errors import InputError, Problems
from cpm_bee.model import flex_attention
from cpm_bee.model.config import ModelConfig
from cpm_bee.pretrained import PretrainedModel, open_pretrained
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import insert_quantized_linears
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.data_size import DataSurvey, StepShape, survey
from cpm_bee.train.flag_checks import (
    MAX_SEED,
    check_flags,
    check_paths,
    data_folders,
    torch_only_flags,
)
from cpm_bee.train.initial_delta import InitialDelta
from cpm_bee.train.options import ALWAYS, AUTO, NEVER, Options
from cpm_bee.train.provenance import RunProvenance

SavedState = tuple[dict[str, Any], dict[str, Any]]  # of the engine, and of the trainer


@dataclass
class Inputs:
    """The inputs of a run. The model has its LoRA, but no values yet.

    Attributes:
        engine: "torch" or "bmtrain".
        datasets: the training set and, if there is one, the evaluation set, by flag.
        surveys: a survey of each data set, by flag, for a dry run.
        saved_state: the state of a resumed run; see `RunFiles.load_state`.
        fresh_start: why a run that would resume if it could begins anew, for people; or "".
    """

    num_processes: int
    device: torch.device
    dtype: torch.dtype
    engine: str
    delta_config: DeltaConfig | None
    pretrained: PretrainedModel
    datasets: dict[str, BinaryDataset | Mixture]
    surveys: dict[str, DataSurvey]
    files: RunFiles
    saved_state: SavedState | None
    fresh_start: str

    def take_saved_state(self) -> SavedState | None:
        """Returns the saved state and drops it from the inputs."""
        taken, self.saved_state = self.saved_state, None
        return taken


def check(options: Options, *, saves: bool = True) -> Inputs:
    """Open and check the inputs of a run.

    Args:
        saves: whether the run saves weights and states, for which there must be room.

    Raises:
        InputError: lists all problems.
        RunError: there are none, but the disk has no room for the results.
    """
    problems = Problems()
    num_processes = RankInfo.of_this_process().world_size
    device, dtype, engine, initial_delta = None, torch.float32, "", None
    check_flags(options, num_processes, problems)
    missing = check_paths(options, problems)
    with problems.collecting():
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        engine = choose_engine(options.engine, device, options.quantize, torch_only_flags(options))
    if options.use_delta and "--init-delta" not in missing:
        with problems.collecting():
            initial_delta = InitialDelta(options)
    delta_config = None if initial_delta is None else initial_delta.config

    datasets = _open_data(options, missing, problems)
    # Full fine-tuning updates fp32 weights; a frozen base is held in the compute type.
    held = dtype if options.use_delta else torch.float32
    pretrained = _open_pretrained(options, held, missing, problems)

    surveys: dict[str, DataSurvey] = {}
    files = saved_state = None
    fresh_start = ""
    shapes = step_shapes(options, num_processes)
    if device is not None and options.attention == flex_attention.FLEX:
        with problems.collecting():
            _refuse_flex(device, pretrained)
    if pretrained is not None:
        if initial_delta is not None:
            _insert_delta(pretrained, initial_delta, _seed(options), problems)
        files = _run_files(options, pretrained, delta_config, datasets.get("--eval-dataset"))
        if options.dry_run:  # a run takes the lock on its first rank, later
            with problems.collecting():
                files.refuse_if_locked()
        for flag, dataset in datasets.items() if options.dry_run else ():
            with problems.collecting():
                surveys[flag] = survey(dataset, pretrained.tokenizer, shapes[flag])
    all_opened = datasets.keys() == data_folders(options).keys()
    if files is not None and options.resume != NEVER and all_opened:
        settings = shapes["--dataset"].settings(datasets["--dataset"].fingerprint)
        with problems.collecting():
            saved_state, fresh_start = _load_state(options.resume, files, settings)

    problems.raise_if_any("this run cannot start:")
    assert device is not None and pretrained is not None and files is not None
    if saves and RankInfo.of_this_process().rank == 0:  # which writes
        _require_room(files, pretrained, saved_state)
    return Inputs(
        num_processes=num_processes,
        device=device,
        dtype=dtype,
        engine=engine,
        delta_config=delta_config,
        pretrained=pretrained,
        datasets=datasets,
        surveys=surveys,
        files=files,
        saved_state=saved_state,
        fresh_start=fresh_start,
    )


def _open_data(
    options: Options, missing: set[str], problems: Problems
) -> dict[str, BinaryDataset | Mixture]:
    """Open the datasets that exist, by flag."""
    datasets: dict[str, BinaryDataset | Mixture] = {}
    for flag, folder in data_folders(options).items():
        if flag not in missing:
            with problems.collecting():
                is_training = flag == "--dataset"
                datasets[flag] = open_datasets(folder) if is_training else BinaryDataset(folder)
    return datasets


def _refuse_flex(device: torch.device, pretrained: PretrainedModel | None) -> None:
    dropout = 0.0 if pretrained is None else pretrained.model.config.dropout_p
    flex_attention.refuse_if_unavailable(device, dropout)


def _require_room(
    files: RunFiles, pretrained: PretrainedModel, saved_state: SavedState | None
) -> None:
    trained = sum(p.numel() for p in pretrained.model.parameters() if p.requires_grad)
    goes_on = saved_state is not None and not files.begins_new_run
    files.require_room(trained, resume=goes_on)


def _load_state(
    resume: str, files: RunFiles, settings: dict[str, Any]
) -> tuple[SavedState | None, str]:
    """Returns the state that --resume asks for or, with `auto`, why there is none."""
    if resume == AUTO and not files.states():
        return None, f"--resume auto: no saved state {files.state}, the run begins anew"
    path = None if resume in (AUTO, ALWAYS) else Path(resume)
    try:
        return files.load_state(settings, path), ""
    except InputError as error:
        if resume != AUTO:
            raise
        return None, f"warning: --resume auto: the run begins anew, because\n{error}"


def step_shapes(options: Options, num_processes: int) -> dict[str, StepShape]:
    """Returns the shapes of training and evaluation steps, by the flag of the data set."""
    rows = options.batch_size * num_processes
    training = StepShape(
        rows * options.accumulate,
        options.max_length,
        options.drop_last,
        options.seed,
        options.incontext_weights or (),
    )
    return {"--dataset": training, "--eval-dataset": StepShape(rows, options.max_length)}


def _seed(options: Options) -> int:
    """Returns the seed; 0 for one out of range, which `check_flags` has reported."""
    return options.seed if abs(options.seed) < MAX_SEED else 0


def _open_pretrained(
    options: Options, dtype: torch.dtype, missing: set[str], problems: Problems
) -> PretrainedModel | None:
    """Open the model with its vocabulary; adds all problems and returns None on failure."""
    if missing & {"--load", "--model-config", "--vocab"}:
        _check_each_alone(options, missing, problems)
        return None
    only_checks = options.dry_run or problems.count > 0  # quantizing is slow, and writes
    before = problems.count
    with problems.collecting():
        pretrained = open_pretrained(
            options.load,
            options.model_config,
            options.vocab,
            dtype,
            seed=_seed(options),
            quantize=quantize.NONE if only_checks else options.quantize,
            verify=options.verify,
        )
        if only_checks and options.quantize != quantize.NONE:
            insert_quantized_linears(pretrained.model, FORMATS[options.quantize])
    if problems.count == before:
        return pretrained
    if options.load is not None and options.model_config != AUTO:
        # The given config may be the only thing that is wrong, or hide something else.
        with problems.collecting():
            open_pretrained(options.load, AUTO, options.vocab, dtype)
    return None


def _insert_delta(
    pretrained: PretrainedModel, delta: InitialDelta, seed: int, problems: Problems
) -> None:
    with problems.collecting():
        delta.insert_into(pretrained, seed)
        if not any(p.requires_grad for p in pretrained.model.parameters()):
            problems.add("--delta-targets", "this model has none of these layers")


def _check_each_alone(options: Options, missing: set[str], problems: Problems) -> None:
    """Check each existing file of the model alone, as they cannot be compared with each other."""
    if options.load is not None and "--load" not in missing:
        with problems.collecting():
            derive_config(Checkpoint(options.load))
    if options.model_config != AUTO and "--model-config" not in missing:
        with problems.collecting():
            ModelConfig.load(options.model_config)
    if options.vocab is not None and "--vocab" not in missing:
        with problems.collecting():
            Tokenizer.load(options.vocab)


def _run_files(
    options: Options,
    pretrained: PretrainedModel,
    delta_config: DeltaConfig | None,
    evaluation: BinaryDataset | Mixture | None,
) -> RunFiles:
    provenance = RunProvenance(
        pretrained.model.config,
        os.path.abspath(pretrained.tokenizer.source),
        pretrained.fingerprint,
        pretrained.tokenizer.fingerprint,
        "" if evaluation is None else evaluation.fingerprint,
        delta_config,
        options.metric_for_best,
    )
    return RunFiles(
        options.save,
        options.save_name,
        provenance,
        keep_runs=options.keep_runs,
        save_total_limit=options.save_total_limit,
    )
