"""The files of a run: best and last weights, and the training state for resuming."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.checkpoint.sidecar import write_sidecar
from cpm_bee.delta import DeltaConfig
from cpm_bee.delta import save as save_delta
from cpm_bee.disk import shortage
from cpm_bee.errors import InputError, Problems, RunError, shown
from cpm_bee.files import exclusive, refuse_if_held
from cpm_bee.model.config import ModelConfig
from cpm_bee.temporary_files import remove_abandoned
from cpm_bee.train.data_size import IN_CONTEXT, NO_SAMPLES
from cpm_bee.train.log import best_loss_of
from cpm_bee.train.run_folder import RunFolder
from cpm_bee.train.saved_state import check_state, newest_intact
from cpm_bee.train.training_state import LOSS

logger = logging.getLogger(__name__)

_KEPT = ("best", "last")  # weights of a run
_STATE_NAME = re.compile(r"(?P<name>.+?)-state(-\d+)?\.pt")
_NOT_RECORDED = (
    "not recorded by the earlier version of cpm_bee that saved the state; go on with that version, "
    "or start again without --resume"
)


class RunProvenance(NamedTuple):
    """What the weights of a run were made from."""

    config: ModelConfig
    vocabulary: str  # path of the vocabulary
    base_fingerprint: str
    vocabulary_fingerprint: str
    evaluation_fingerprint: str  # of the evaluation set's records; empty without one
    delta: DeltaConfig | None  # None: full fine-tuning
    metric_for_best: str = LOSS  # what chooses the best weights


class RunFiles:
    """Names, writes and reads the files `SAVE/SAVE_NAME-...`. Only rank 0 writes."""

    def __init__(
        self,
        folder: str,
        name: str,
        provenance: RunProvenance,
        *,
        keep_runs: int = 1,
        save_total_limit: int = 2,
    ) -> None:
        self._folder = Path(folder)
        self._name = name
        self._provenance = provenance
        infix = "" if provenance.delta is None else "-delta"
        self.best = self._folder / f"{name}{infix}-best.pt"
        self.last = self._folder / f"{name}{infix}-last.pt"
        self.state = self._folder / f"{name}-state.pt"
        self.log = self._folder / f"{name}-log.jsonl"
        self.report = self._folder / f"{name}-report.html"
        self.curves = self._folder / f"{name}-loss.png"
        weights = [f"{i}-{w}.{s}" for i in ("", "-delta") for w in _KEPT for s in ("pt", "json")]
        endings = [*weights, "-state.pt", "-log.jsonl", "-report.html", "-loss.png"]
        self.places = RunFolder(self._folder, name, endings, keep_runs)
        self._limit = save_total_limit
        # The step of `self.state`, once this run has read or written it. Before that it may be
        # damaged, or another run's.
        self._newest_step: int | None = None
        # A state to begin a new run from, and what it was when it was opened.
        self._origin: tuple[Path, os.stat_result] | None = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Returns the context of a run, in which no other run can write the same files."""
        with exclusive(*self._lock):
            remove_abandoned(self._folder)
            try:
                yield
            finally:
                self.places.discard_unstarted()

    def require_room(self, num_trained: int, *, resume: bool) -> None:
        """Raise `RunError` if the disk has no room for the files of a run.

        Args:
            num_trained: the number of trained values.
            resume: the run replaces the files that are there; otherwise it keeps them.
        """
        halved = self._provenance.delta is None and self._provenance.config.half
        weights, state = num_trained * (2 if halved else 4), num_trained * 12  # with two moments
        needed = -self.places.removed_at_start()
        sizes = []
        states: list[Path | None] = [*self.states()] if resume else []
        states += [None] * (self._limit - len(states))
        files = [(self.best, weights), (self.last, weights), *((path, state) for path in states)]
        for path, size in files:
            present = path.stat().st_size if resume and path and path.is_file() else 0
            sizes.append(max(size, present))
            needed += sizes[-1] - present
        needed += max(sizes)  # a file is replaced only when the new one is whole
        what = (
            f"the weights (best and last) and {self._limit} states (--save-total-limit), one of "
            "them twice while it is replaced,"
        )
        if reason := shortage(self._folder, needed, what):
            raise RunError(f"{self.state}: {reason}; make room, or give another --save")

    def refuse_if_locked(self) -> None:
        """Raise `InputError` if another run is writing these files; for a dry run."""
        refuse_if_held(*self._lock)

    @property
    def _lock(self) -> tuple[Path, str]:
        return (
            self._folder / f".{self._name}.lock",
            f"is writing {self._folder / self._name}-*; wait for that run to end, or give another "
            "--save-name",
        )

    def save_weights(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Save a delta file, or a native checkpoint (in fp16 if the config says half)."""
        path = self.places.to_write(path)
        if self._provenance.delta is not None:
            origin = self._provenance
            prints = (origin.base_fingerprint, origin.vocabulary_fingerprint)
            save_delta(path, tensors, self._provenance.delta, *prints)
            return
        config = self._provenance.config
        if config.half:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        save_tensors(path, tensors)
        sidecar = {
            "config": config.to_dict(),
            "vocab": self._provenance.vocabulary,
            "base_fingerprint": self._provenance.base_fingerprint,
        }
        write_sidecar(path, sidecar)

    def save_state(
        self, engine: dict[str, Any], progress: dict[str, Any], settings: dict[str, Any]
    ) -> Path | None:
        """Save the training state; a resumed run must have the same `settings`.

        The state before it is kept under a numbered name, at most `save_total_limit` states in
        all. With the first state of a new run, the files of an earlier run are moved.

        Returns:
            The folder that they were moved to, or None.
        """
        state = {
            "settings": settings,
            "delta": self._delta(),
            "engine": engine,
            "progress": progress,
            "base_fingerprint": self._provenance.base_fingerprint,
            "metric_for_best": self._provenance.metric_for_best,
            **self._sets(),
        }
        path = self.places.to_write(self.state)
        before = self._newest_step
        if before not in (None, progress["step"]) and self._limit > 1:
            _add_name(path, path.with_name(self.places.numbered_state(before)))
        save_tensors(path, state)
        self._newest_step = progress["step"]
        self._remove_surplus_states(path.parent, progress["step"])
        return self.places.take_place()

    def _remove_surplus_states(self, folder: Path, newest: int) -> None:
        kept = 1  # the newest one
        for step, path in self.places.numbered_states(folder.iterdir()):
            if step >= newest or kept == self._limit:  # later ones: this run begins before them
                path.unlink()
            else:
                kept += 1

    def states(self) -> list[Path]:
        """Returns the saved states of the current run, newest first."""
        files = self.places.current()
        newest = [path for path in files if path.name == self.state.name]
        return newest + [path for _, path in self.places.numbered_states(files)]

    def _sets(self) -> dict[str, str]:
        """Returns the fingerprints that are not in states of earlier versions."""
        return {
            "vocabulary_fingerprint": self._provenance.vocabulary_fingerprint,
            "evaluation_fingerprint": self._provenance.evaluation_fingerprint,
        }

    def _delta(self) -> dict[str, Any]:
        config = self._provenance.delta
        return {} if config is None else {**asdict(config), "targets": list(config.targets)}

    def load_state(
        self, settings: dict[str, Any] | None = None, path: Path | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the (engine, progress) of `save_state`.

        Args:
            path: a state to begin a new run from; the newest one of the current run if None, which
                then goes on. If that one is damaged, a warning says so, and the one before it is
                used.

        Raises:
            DamagedFile: all states are damaged.
            InputError: there is no state, or it is that of a run with another base, delta,
                vocabulary, evaluation set or, if given, other settings; all differences are listed.
        """
        states = self.states()
        is_foreign = path is not None and not (
            states and path.is_file() and path.samefile(states[0])
        )
        if path is None:
            if not states:
                raise InputError(f"{self.state}: there is no saved state to resume from")
            path, state = newest_intact(states)
        elif not path.is_file():
            raise InputError(f"--resume {path}: no such file")
        else:
            state = load_tensors(path, "a training state", verify=True)
            check_state(path, state)
        if state.get("base_fingerprint") != self._provenance.base_fingerprint:
            raise InputError(f"{path}: is the state of a run on another base model")
        problems = Problems()
        if state["delta"] != self._delta():
            was = shown(state["delta"]) if state["delta"] else "full fine-tuning"
            problems.add("delta", f"{self._delta() or 'full fine-tuning'}, it was {was}")
        for (name, value), flag in zip(
            self._sets().items(), ("tokens of --vocab", "records of --eval-dataset"), strict=True
        ):
            if name not in state:
                logger.warning(
                    f"{path}: an earlier version saved it and did not record the {flag}; "
                    "they are taken to be the same as before"
                )
            elif state[name] != value:
                problems.add(flag, f"{value or 'none'}, it was {shown(state[name] or 'none')}")
        metric, before = self._provenance.metric_for_best, state.get("metric_for_best", LOSS)
        if metric != before:
            problems.add("--metric-for-best", f"{metric}, it was {shown(before)}")
        for name, value in (settings or {}).items():
            older = NO_SAMPLES if name == IN_CONTEXT else _NOT_RECORDED
            before = state["settings"].get(name, older)
            if before != value:
                problems.add(name, f"{value}, it was {before}")
        problems.raise_if_any(f"{path}: --resume needs the same as before:")
        if is_foreign:
            self._origin = (path, path.stat())
        elif states[0].name == self.state.name and path.samefile(states[0]):
            self._newest_step = state["progress"]["step"]
        return state["engine"], state["progress"]

    @property
    def begins_new_run(self) -> bool:
        """Whether a resumed run is a new one, because its state is not the newest of this run."""
        return self._origin is not None

    def begin(self, progress: dict[str, Any] | None) -> bool:
        """Prepare the folder for this run.

        Args:
            progress: of the state to resume from, or None.

        Returns:
            Whether the best weights that belong to `progress` are there.
        """
        if progress is not None and self._origin is None:
            self.places.finish()
            return True
        self.places.begin()
        if progress is None or self._origin is None:
            return False
        return self._copy_origin(*self._origin, progress["best_loss"])

    def _copy_origin(self, state: Path, opened: os.stat_result, best_loss: float) -> bool:
        """Copy what another run left beside a state: its log, and its best weights.

        Returns false if its best weights are later than the state, and so not copied.
        """
        if not (state.is_file() and os.path.samestat(opened, state.stat())):
            raise InputError(
                f"{state}: an earlier start that was killed has now been completed, and has moved "
                "this file; look for it in the folders of earlier runs, and give its new path"
            )
        match = _STATE_NAME.fullmatch(state.name)
        if match is None:
            return False
        copies = {
            path: state.with_name(match["name"] + path.name.removeprefix(self._name))
            for path in (self.log, self.best, self.best.with_suffix(".json"))
        }
        log = copies.pop(self.log)
        if not log.is_file():
            return False
        shutil.copyfile(log, self.places.to_write(self.log))
        is_evaluated = math.isfinite(best_loss)  # else the best weights are always the last ones
        is_there = copies[self.best].is_file()
        metric = self._provenance.metric_for_best
        if not (is_evaluated and is_there and best_loss_of(log, metric) == best_loss):
            return False
        for path, source in copies.items():
            if source.is_file():
                shutil.copyfile(source, self.places.to_write(path))
        return True


def _add_name(path: Path, name: Path) -> None:
    """Keep a file under a second name while its first one is given to another file."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except FileNotFoundError:  # somebody has removed it
        return
    except OSError:  # a file system without hard links
        path.rename(name)
