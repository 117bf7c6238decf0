"""Sets up a run from its options: engine, model, data, files."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from cpm_bee import delta, quantize
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.engine import Engine, OptimizerSettings
from cpm_bee.engine.parallel import distribute
from cpm_bee.engine.select import bmtrain_unavailable_reason, make_engine
from cpm_bee.errors import CpmBeeError, InputError, Problems, RunError
from cpm_bee.model import flex_attention
from cpm_bee.model.frozen.buffers import return_freed_memory
from cpm_bee.pretrained import PretrainedModel, choose_device, choose_dtype, open_pretrained
from cpm_bee.progress import print_above_bar
from cpm_bee.quantize.linear import num_weights
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train import memory_estimate
from cpm_bee.train.checkpoints import RunFiles, RunProvenance
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.log import Reporter
from cpm_bee.train.options import AUTO, FSDP, Options
from cpm_bee.train.trainer import Trainer

_LESS_MEMORY = (
    "Less memory: --checkpointing full, --max-tokens (the same step in smaller parts), a smaller "
    "--batch-size or --max-length"
)

_NAMES = {False: "none", True: "full"}


def finetune(options: Options) -> None:
    """Run a fine-tuning.

    Raises:
        InputError: flags or files are wrong; found before any process waits for another.
        RunError: the run failed; its last good state is saved.
    """
    _check(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    flex_attention.is_chosen(options.attention, device, 0.0)  # told now if it cannot be
    datasets = [BinaryDataset(d) for d in (options.dataset, options.eval_dataset) if d]
    delta_config = _delta_config(options)
    # Full fine-tuning updates fp32 weights; a frozen base is held in the compute type.
    pretrained = open_pretrained(
        options.load,
        options.model_config,
        options.vocab,
        dtype if options.use_delta else torch.float32,
        seed=options.seed,
        quantize=quantize.NONE if options.dry_run else options.quantize,
    )
    if delta_config is not None:
        delta.insert(pretrained.model, delta_config, options.seed)
    vocabulary = os.path.abspath(pretrained.tokenizer.source)
    provenance = RunProvenance(
        pretrained.model.config, vocabulary, pretrained.fingerprint, delta_config
    )
    files = RunFiles(options.save, options.save_name, provenance)
    # Read now: a state that does not fit is told before the data is read.
    resumed_step = files.load_state()[1]["step"] if options.resume else None
    if options.dry_run:
        num_processes = RankInfo.of_this_process().world_size
        print(f"dry run: {num_processes} process(es) can start, on {device.type} in {dtype}")
        return
    engine = make_engine(options.engine, _bmtrain_unavailable_reason(options), device, dtype)
    try:
        parallel_summary = distribute(options.parallel, options.offload, engine, pretrained)
        _train(options, engine, pretrained, datasets, files, resumed_step, parallel_summary)
    finally:
        engine.close()


def _train(
    options: Options,
    engine: Engine,
    pretrained: PretrainedModel,
    datasets: list[BinaryDataset],
    files: RunFiles,
    resumed_step: int | None,
    parallel_summary: str,
) -> None:
    model = pretrained.model
    sizes = _sizes(pretrained)
    indexes = [_index(engine, dataset, pretrained.tokenizer) for dataset in datasets]
    loaders = _loaders(options, engine, indexes, pretrained.tokenizer)
    checkpointing = _checkpointing(options, engine, pretrained, indexes[0])
    model.encoder.set_checkpointing(checkpointing.checkpointing)
    model.attention = options.attention
    if engine.device.type == "cpu":
        return_freed_memory()
    if options.compile:
        # Here, for it loads the compiler.
        from cpm_bee.model.compiled import compile_blocks

        compile_blocks(model.encoder)
    engine.prepare(
        model,
        OptimizerSettings(
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
            loss_scale=options.loss_scale,
            loss_scale_factor=options.loss_scale_factor,
            loss_scale_steps=options.loss_scale_steps,
        ),
    )
    if engine.rank == 0 and not options.resume and (previous := files.archive_previous()):
        print_above_bar(f"the files of the run before are in {previous}")
    reporter = Reporter(
        files.log if engine.rank == 0 else None,
        resumed_step=resumed_step,
        task=options.task_name,
        tensorboard=options.tensorboard,
    )
    evaluation = loaders[1] if len(loaders) > 1 else None
    trainer = Trainer(model, engine, loaders[0], evaluation, options, files, reporter)
    if options.resume:
        trainer.resume()
        reporter.line(f"resumed after step {trainer.state.step}")
    for line in _summary(options, engine, sizes, loaders):
        reporter.line(line)
    reporter.line(parallel_summary)
    reporter.line(f"checkpointing {_NAMES[checkpointing.checkpointing]}: {checkpointing.reason}")
    reporter.start({"options": asdict(options), "world_size": engine.world_size})
    try:
        trainer.run()
    except torch.OutOfMemoryError as error:
        raise RunError(f"{str(error).splitlines()[0]} {_LESS_MEMORY}") from None
    finally:
        reporter.close()
    reporter.line(f"saved: {files.best}, {files.last}")


def _check(options: Options) -> None:
    """Raise `InputError` with everything that flags alone or missing files make impossible."""
    problems = Problems()
    for flag, path in (("--dataset", options.dataset), ("--eval-dataset", options.eval_dataset)):
        if path is not None and not Path(path).is_dir():
            problems.add(f"{flag} {path}", "no such folder; preprocess_dataset.py makes it")
    if options.load is not None and not Path(options.load).exists():
        problems.add(
            f"--load {options.load}",
            "no such checkpoint; put a CPM-Bee model there, or use the one that comes with this "
            "project: --model-config auto --load ckpts/cpm-bee-tiny",
        )
    for flag, path in (("--model-config", options.model_config), ("--vocab", options.vocab)):
        if path not in (None, "auto") and not Path(path).is_file():
            problems.add(f"{flag} {path}", "no such file")
    if options.load is None and options.use_delta:
        problems.add("--use-delta", "needs a base model (--load CHECKPOINT)")
    if options.quantize != quantize.NONE and not options.use_delta:
        problems.add(
            f"--quantize {options.quantize}",
            "needs --use-delta: a quantised base cannot be trained in full",
        )
    if options.offload and options.parallel != FSDP:
        problems.add("--offload", "needs --parallel fsdp: it keeps the parts in host memory")
    if options.offload and RankInfo.of_this_process().world_size == 1:
        problems.add("--offload", "needs several processes (torchrun): one has no parts to keep")
    if options.delta_dropout >= 1:
        problems.add("--delta-dropout", "must be less than 1")
    if options.engine == "bmtrain" and (unavailable_reason := _bmtrain_unavailable_reason(options)):
        problems.add("--engine bmtrain", unavailable_reason)
    if abs(options.seed) >= 2**48:
        problems.add(f"--seed {options.seed}", "must be less than 2**48")
    if options.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        problems.add("--tensorboard", "needs an extra: pip install -e .[tensorboard]")
    if Path(options.save).exists() and not Path(options.save).is_dir():
        problems.add(f"--save {options.save}", "is a file; a folder is needed")
    if options.save_name != Path(options.save_name).name or not options.save_name:
        problems.add(f"--save-name {options.save_name}", "is a name, the folder is --save")
    problems.raise_if_any("this run cannot start:")


def _bmtrain_unavailable_reason(options: Options) -> str | None:
    extras = {
        "--parallel": options.parallel != AUTO,
        "--offload": options.offload,
        "--compile": options.compile,
    }
    return bmtrain_unavailable_reason(choose_device(options.device), options.quantize, extras)


def _delta_config(options: Options) -> delta.DeltaConfig | None:
    if not options.use_delta:
        return None
    return delta.DeltaConfig(
        rank=options.delta_rank,
        alpha=options.delta_alpha,
        targets=options.delta_targets,
        dropout=options.delta_dropout,
    )


def _index(engine: Engine, dataset: BinaryDataset, tokenizer: Tokenizer) -> TokenIndex:
    """Rank 0 makes the index where necessary; all ranks learn whether it could.

    Raises `InputError` on all ranks if it could not, or if the ranks have other data or another
    vocabulary: each plans for itself, and they would wait for each other for ever.
    """
    failure: Exception | None = None
    if engine.rank == 0:
        try:
            TokenIndex.of(dataset, tokenizer)
        except (CpmBeeError, OSError) as error:
            failure = error
    if engine.reduce([float(failure is not None)])[0]:
        raise failure or InputError(f"{dataset.folder}: the first process cannot read it")
    own = int(dataset.fingerprint[:15], 16) ^ int(tokenizer.fingerprint[:15], 16)
    largest, least = engine.reduce_max([own, -own])
    if largest != -least:
        raise InputError(
            f"{dataset.folder}: the processes have different data or vocabularies; copy the folder "
            "and the vocabulary to all machines again"
        )
    return TokenIndex.of(dataset, tokenizer)


def _loaders(
    options: Options, engine: Engine, indexes: list[TokenIndex], tokenizer: Tokenizer
) -> list[DataLoader]:
    rows = options.batch_size * engine.world_size
    loader = partial(
        DataLoader,
        tokenizer=tokenizer,
        engine=engine,
        max_length=options.max_length,
        max_tokens=options.max_tokens,
    )
    training = loader(
        indexes[0],
        rows=rows * options.accumulate,
        accumulate=options.accumulate,
        drop_last=options.drop_last,
        shuffle_seed=options.seed,
    )
    return [training] + [loader(index, rows=rows) for index in indexes[1:]]


def _checkpointing(
    options: Options, engine: Engine, pretrained: PretrainedModel, index: TokenIndex
) -> memory_estimate.CheckpointingChoice:
    """Whether activations are computed again, and why; the same on all ranks."""
    if options.checkpointing != "auto":
        return memory_estimate.CheckpointingChoice(options.checkpointing == "full", "as asked")
    config = pretrained.model.config
    rows = options.batch_size * options.max_length
    batch = memory_estimate.batch_of_data(
        index.lengths,
        index.num_targets,
        options.max_length,
        min(rows, options.max_tokens or rows),
        config.vocab_size,
    )
    training = memory_estimate.TrainingSetup(engine.dtype, _delta_config(options), options.quantize)
    available = memory_estimate.free_memory(engine.device, engine.world_size)
    shards = engine.world_size if engine.lockstep else 1
    own = memory_estimate.choose_checkpointing(config, training, batch, available, shards)
    if engine.reduce_max([int(own.checkpointing)])[0] and not own.checkpointing:
        return memory_estimate.CheckpointingChoice(True, "another process has less memory")
    return own


def _sizes(pretrained: PretrainedModel) -> tuple[int, int]:
    """The numbers of weights and of trained ones, before an engine cuts them up."""
    trained = sum(p.numel() for p in pretrained.model.parameters() if p.requires_grad)
    return num_weights(pretrained.model), trained


def _summary(
    options: Options, engine: Engine, sizes: tuple[int, int], loaders: list[DataLoader]
) -> list[str]:
    total, trained = sizes
    scale = engine.loss_scale if engine.dtype == torch.float16 else "not needed"
    lines = [
        f"engine {engine.name}, {engine.world_size} process(es) on {engine.device.type}, "
        f"{str(engine.dtype).removeprefix('torch.')}, loss scale {scale}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()}",
        f"model with {total:,} parameters, {trained:,} of them trained",
    ]
    for name, loader in zip(("training", "evaluation"), loaders, strict=False):
        lines.append(f"{name}: {loader.num_records} records")
        if loader.num_too_long:
            share = loader.num_too_long / (loader.num_records + loader.num_too_long)
            lines.append(
                f"warning: {loader.num_too_long} {name} records ({share:.2%}) are longer than "
                f"--max-length {options.max_length} and left out"
            )
    lines += _schedule_warning(options, loaders[0])
    return lines


def _schedule_warning(options: Options, training: DataLoader) -> list[str]:
    if options.lr_decay_style not in ("linear", "cosine"):
        return []
    steps = options.epoch * training.min_steps
    last = options.start_step + min(steps, options.max_steps or steps)
    if last <= options.schedule_end:
        return []
    return [
        f"warning: the {options.lr_decay_style} schedule reaches rate 0 at step "
        f"{options.schedule_end} (--train-iters), the run goes on to step {last} or more"
    ]
