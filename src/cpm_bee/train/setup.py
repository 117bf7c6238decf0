"""Runs a fine-tuning from its options to its end, and sets up its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch

from cpm_bee.data.mixture import MixedIndex
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.engine import Engine, OptimizerSettings
from cpm_bee.engine.select import make_engine
from cpm_bee.errors import RunError, keeping
from cpm_bee.language import said
from cpm_bee.model import flex_probe
from cpm_bee.model.flex_attention import FLEX, SDPA
from cpm_bee.model.frozen.buffers import return_freed_memory
from cpm_bee.model.network import CPMBee
from cpm_bee.report.writer import ReportWriter
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.activation_checkpointing import CheckpointingChoice, choose_for_run
from cpm_bee.train.agreement import check_same_step, open_data, refuse_different_deltas
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.checks import Inputs, check, step_shapes
from cpm_bee.train.data_loader import DataLoader
from cpm_bee.train.digest import has_digests
from cpm_bee.train.display import Display
from cpm_bee.train.dry_run import describe_run
from cpm_bee.train.initial_delta import init_delta_line
from cpm_bee.train.log import Reporter
from cpm_bee.train.loggers import open_loggers
from cpm_bee.train.options import CURVES, NO_REPORT, Options
from cpm_bee.train.receipt import recorded
from cpm_bee.train.run_facts import facts_of
from cpm_bee.train.summary import (
    checkpointing_line,
    data_lines,
    engine_line,
    model_line,
    schedule_warnings,
)
from cpm_bee.train.trainer import Trainer
from cpm_bee.train.training_state import TrainingState

_LESS_MEMORY = (
    "Less memory: --checkpointing full, --max-tokens (the same step in smaller parts), a smaller "
    "--batch-size or --max-length"
)


def finetune(options: Options) -> None:
    """Run a fine-tuning or, with `--dry-run`, only check it and print what would run.

    Raises:
        InputError: flags, files or data are wrong.
        RunError: the run failed; its last good state is saved.
    """
    inputs = check(options)
    is_first = RankInfo.of_this_process().rank == 0
    if options.dry_run:
        if is_first:
            print(said("\n".join(describe_run(options, inputs))), flush=True)
        return
    with (
        keeping("this run had not begun, and what earlier runs saved is kept"),
        inputs.files.lock() if is_first else nullcontext(),
        set_up(options, inputs) as run,
    ):
        for line in run.summary:
            run.reporter.line(line)
        run.reporter.start({"options": asdict(options), "world_size": run.engine.world_size})
        trainer = Trainer(
            run.model,
            run.engine,
            run.training,
            run.evaluation,
            options,
            run.files,
            run.reporter,
            run.state,
            digests=run.digests,
        )
        try:
            with recorded(options, inputs, run):
                trainer.run()
        except torch.OutOfMemoryError as error:
            raise RunError(f"{str(error).splitlines()[0]} {_LESS_MEMORY}") from None
        report = "" if options.report == NO_REPORT else f"; report: {run.files.report}"
        run.reporter.line(f"saved: {run.files.best}, {run.files.last}{report}")


@dataclass(frozen=True)
class Run:
    """The parts of a run; its engine has taken over the model.

    Attributes:
        evaluation: the evaluation set's loader, or None to train without.
        files: where to write; used on rank 0.
        state: where it begins: at step 0 or, if resumed, after a later one.
        is_resumed: whether it goes on from a saved state.
        digests: whether the trained tensors are few enough for digests of them.
        summary: lines that describe the run to people.
    """

    model: CPMBee
    engine: Engine
    training: DataLoader
    evaluation: DataLoader | None
    files: RunFiles
    reporter: Reporter
    state: TrainingState
    is_resumed: bool
    digests: bool
    summary: list[str]


@contextmanager
def set_up(options: Options, inputs: Inputs, display: Display | None = None) -> Iterator[Run]:
    """Build a run from its inputs; collective. On exit it leaves the process group.

    Args:
        display: shows the steps to people, if not as usual.

    Raises:
        InputError: the data cannot be used with this model, or differ between processes.
    """
    model, tokenizer, files = inputs.pretrained.model, inputs.pretrained.tokenizer, inputs.files
    with closing(make_engine(inputs.engine, inputs.device, inputs.dtype)) as engine:
        refuse_different_deltas(engine, options)
        sizes, digests = model_line(model), has_digests(model)
        distribution = engine.load_model(inputs.pretrained, options.parallel, options.offload)
        indexes = [open_data(engine, data, tokenizer) for data in inputs.datasets.values()]
        training, evaluation = _loaders(options, engine, indexes, tokenizer)
        checkpointing = _choose_checkpointing(options, inputs, engine, training)
        model.encoder.set_checkpointing(checkpointing.checkpointing)
        model.attention, attention_lines = _choose_attention(options, model, engine)
        if engine.device.type == "cpu":
            return_freed_memory()
        if options.compile:
            # Imported only here, as it loads the compiler.
            from cpm_bee.model.compiled import compile_blocks

            compile_blocks(model.encoder)
        engine.prepare(model, _optimizer_settings(options))
        saved = inputs.take_saved_state()
        check_same_step(engine, -1 if saved is None else saved[1]["step"])
        resumed_step, state = None, TrainingState()
        if saved is not None:
            engine_state, trainer_state = saved
            engine.load_training_state(engine_state)
            resumed_step, state = trainer_state["step"], TrainingState(**trainer_state)
            # Its file is mapped: while a name refers to it, it takes disk space beside newer ones.
            del saved, engine_state
        # Only after all ranks have opened the state to resume from, which this may move.
        _begin(engine, files, resumed_step is not None, state)
        summary = [inputs.fresh_start] if inputs.fresh_start else []
        is_resumed = resumed_step is not None
        summary += [f"resumed after step {resumed_step}"] if is_resumed else []
        summary += [
            _engine_line(engine),
            sizes,
            *init_delta_line(options, is_resumed),
        ]
        summary += _data_lines(options, training, evaluation)
        summary += [distribution, checkpointing_line(checkpointing), *attention_lines]
        writes = engine.rank == 0
        report = _report(options, engine, model, [training, evaluation], files, summary)
        with Reporter(
            files.places.to_write(files.log) if writes else None,
            resumed_step=resumed_step,
            evaluated_step=state.evaluated_step if state.evaluated_step >= 0 else state.step - 1,
            task=options.task_name,
            display=display or Display(options.log_interval, options.epoch),
            loggers=open_loggers(options) if writes else [],
            report=report if writes else None,
        ) as reporter:
            yield Run(
                model=model,
                engine=engine,
                training=training,
                evaluation=evaluation,
                files=files,
                reporter=reporter,
                state=state,
                is_resumed=is_resumed,
                digests=digests,
                summary=summary,
            )


def _report(
    options: Options,
    engine: Engine,
    model: CPMBee,
    loaders: list[DataLoader | None],
    files: RunFiles,
    summary: list[str],
) -> ReportWriter | None:
    if options.report == NO_REPORT:
        return None
    found = [loader for loader in loaders if loader is not None]
    facts = facts_of(options, engine, model, found, files, summary)
    place, curves = files.places.to_write, options.report == CURVES
    return ReportWriter(place, files.report, files.curves, facts, with_curves=curves)


def _begin(engine: Engine, files: RunFiles, resumes: bool, state: TrainingState) -> None:
    """Prepare the folder of a run, and correct the state that it begins with; collective.

    A new run that begins at the state of another one saves that state first. If the best weights of
    that run are later than the state, those of the state are evaluated, and are the best so far.
    """
    begins_new_run = lacks_best = False
    if engine.rank == 0:
        lacks_best = not files.begin(asdict(state) if resumes else None)
        begins_new_run = files.begins_new_run
    figures = engine.reduce_max([int(begins_new_run), int(lacks_best)])
    if figures[0]:
        state.saved_step = -1
        if figures[1]:
            state.forget_best()


def _loaders(
    options: Options, engine: Engine, indexes: list[TokenIndex | MixedIndex], tokenizer: Tokenizer
) -> tuple[DataLoader, DataLoader | None]:
    shapes = step_shapes(options, engine.world_size)

    def loader(
        index: TokenIndex | MixedIndex,
        flag: str,
        accumulate: int = 1,
        *,
        as_generated: bool = False,
    ) -> DataLoader:
        return DataLoader(
            index,
            tokenizer,
            engine,
            rows=shapes[flag].rows,
            max_length=shapes[flag].max_length,
            accumulate=accumulate,
            max_tokens=options.max_tokens,
            drop_last=shapes[flag].drop_last,
            shuffle_seed=shapes[flag].shuffle_seed,
            as_generated=as_generated,
            in_context=shapes[flag].in_context,
        )

    training = loader(indexes[0], "--dataset", options.accumulate)
    if len(indexes) == 1:
        return training, None
    return training, loader(indexes[1], "--eval-dataset", as_generated=True)


def _choose_checkpointing(
    options: Options, inputs: Inputs, engine: Engine, training: DataLoader
) -> CheckpointingChoice:
    """Whether activations are recomputed, and why; collective, the same on all ranks."""
    own = choose_for_run(
        options,
        inputs.pretrained.model.config,
        inputs.delta_config,
        engine.device,
        engine.dtype,
        training.lengths(0),
        training.num_targets,
        num_processes=engine.world_size,
        is_sharded=engine.lockstep,
    )
    if engine.reduce_max([int(own.checkpointing)])[0] and not own.checkpointing:
        return CheckpointingChoice(True, "another process has less memory")
    return own


def _choose_attention(options: Options, model: CPMBee, engine: Engine) -> tuple[str, list[str]]:
    """How the model attends, and a line about it if flex was requested; collective.

    All ranks do the same: sums that differ in their rounding would add up to different weights.
    """
    if options.attention != FLEX:
        return SDPA, []
    reason: str | None = "the bias table is trained, and flex is only for a frozen one"
    if not model.position_bias.relative_attention_bias.requires_grad:
        with engine.autocast():  # as in training, so that the compiled kernels are used again
            reason = flex_probe.probe(model.config, engine.dtype, engine.device)
    if not engine.reduce_max([int(reason is not None)])[0]:
        return FLEX, ["attention flex: agrees with sdpa on this machine"]
    return SDPA, [f"attention sdpa instead of flex: {reason or 'it fails in another process'}"]


def _optimizer_settings(options: Options) -> OptimizerSettings:
    return OptimizerSettings(
        weight_decay=options.weight_decay,
        clip_grad=options.clip_grad,
        loss_scale=options.loss_scale,
        loss_scale_factor=options.loss_scale_factor,
        loss_scale_steps=options.loss_scale_steps,
    )


def _engine_line(engine: Engine) -> str:
    return engine_line(
        engine.name, engine.world_size, engine.device, engine.dtype, engine.loss_scale
    )


def _data_lines(options: Options, training: DataLoader, evaluation: DataLoader | None) -> list[str]:
    lines = data_lines("training", training.size, options.max_length)
    lines += [f"  {line}" for line in training.unwritable_answers()]
    if evaluation is not None:
        lines += data_lines("evaluation", evaluation.size, options.max_length)
        lines += [f"  {line}" for line in evaluation.unwritable_answers()]
    return lines + schedule_warnings(options, training.size.min_steps)
