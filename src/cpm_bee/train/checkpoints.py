"""The files of a run: best and last weights, and the training state for resuming."""

from __future__ import annotations

import logging
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
from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.files import exclusive, refuse_if_held
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.run_folder import RunFolder
from cpm_bee.train.saved_state import check_state

logger = logging.getLogger(__name__)

_KEPT = ("best", "last")  # weights of a run
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


def saved_delta_config(folder: str, name: str) -> DeltaConfig | None:
    """The settings of the delta in a run's training state; None if there is no such state.

    Raises:
        InputError: the state is damaged.
    """
    path = Path(folder) / f"{name}-state.pt"
    place = RunFolder(Path(folder), name, [], 1).to_read(path)
    if not place.is_file():
        return None
    state = load_tensors(place, "a training state")
    check_state(path, state)
    saved = state["delta"]
    if not saved:
        return None
    try:
        return DeltaConfig(**{**saved, "targets": tuple(saved["targets"])})
    except (TypeError, KeyError):
        raise InputError(f"{path}: its delta is {shown(saved)}, not what a run saves") from None


class RunFiles:
    """Names, writes and reads the files `SAVE/SAVE_NAME-...`. Only rank 0 writes."""

    def __init__(
        self, folder: str, name: str, provenance: RunProvenance, *, keep_runs: int = 1
    ) -> None:
        self._folder = Path(folder)
        self._name = name
        self._provenance = provenance
        infix = "" if provenance.delta is None else "-delta"
        self.best = self._folder / f"{name}{infix}-best.pt"
        self.last = self._folder / f"{name}{infix}-last.pt"
        self.state = self._folder / f"{name}-state.pt"
        self.log = self._folder / f"{name}-log.jsonl"
        weights = [f"{i}-{w}.{s}" for i in ("", "-delta") for w in _KEPT for s in ("pt", "json")]
        endings = [*weights, "-state.pt", "-log.jsonl"]
        self.places = RunFolder(self._folder, name, endings, keep_runs)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Returns the context of a run, in which no other run can write the same files."""
        with exclusive(*self._lock):
            try:
                yield
            finally:
                self.places.discard_unstarted()

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

        With the first state of a new run, the files of an earlier run are moved.

        Returns:
            The folder that they were moved to, or None.
        """
        state = {
            "settings": settings,
            "delta": self._delta(),
            "engine": engine,
            "progress": progress,
            "base_fingerprint": self._provenance.base_fingerprint,
            **self._sets(),
        }
        save_tensors(self.places.to_write(self.state), state)
        return self.places.take_place()

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
        self, settings: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the (engine, progress) of `save_state`.

        Raises:
            InputError: there is no state, or it is that of a run with another base, delta,
                vocabulary, evaluation set or, if given, other settings; all differences are listed.
        """
        path = self.places.to_read(self.state)
        if not path.is_file():
            raise InputError(f"{self.state}: there is no saved state to resume from")
        state = load_tensors(path, "a training state")
        check_state(self.state, state)
        if state.get("base_fingerprint") != self._provenance.base_fingerprint:
            raise InputError(f"{self.state}: is the state of a run on another base model")
        problems = Problems()
        if state["delta"] != self._delta():
            was = shown(state["delta"]) if state["delta"] else "full fine-tuning"
            problems.add("delta", f"{self._delta() or 'full fine-tuning'}, it was {was}")
        for (name, value), flag in zip(
            self._sets().items(), ("tokens of --vocab", "records of --eval-dataset"), strict=True
        ):
            if name not in state:
                logger.warning(
                    f"{self.state}: an earlier version saved it and did not record the {flag}; "
                    "they are taken to be the same as before"
                )
            elif state[name] != value:
                problems.add(flag, f"{value or 'none'}, it was {shown(state[name] or 'none')}")
        for name, value in (settings or {}).items():
            before = state["settings"].get(name, _NOT_RECORDED)
            if before != value:
                problems.add(name, f"{value}, it was {before}")
        problems.raise_if_any(f"{self.state}: --resume needs the same as before:")
        return state["engine"], state["progress"]
