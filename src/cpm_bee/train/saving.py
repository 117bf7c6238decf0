"""The files of a run: best and last weights, and the state to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpm_bee import __version__, delta
from cpm_bee.checkpoint import load_tensors, save_tensors
from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file
from cpm_bee.model.config import ModelConfig


class Identity(NamedTuple):
    """What the weights of a run belong to."""

    config: ModelConfig
    vocabulary: str  # path of the vocabulary
    base_fingerprint: str
    delta: DeltaConfig | None  # None: full fine-tuning


class RunFiles:
    """`SAVE/SAVE_NAME-...`: names and ways of writing. Used on rank 0 alone."""

    def __init__(self, folder: str, name: str, identity: Identity) -> None:
        self._folder = Path(folder)
        self._name = name
        self._identity = identity
        infix = "" if identity.delta is None else "-delta"
        self.best = self._folder / f"{name}{infix}-best.pt"
        self.last = self._folder / f"{name}{infix}-last.pt"
        self.state = self._folder / f"{name}-state.pt"
        self.log = self._folder / f"{name}-log.jsonl"

    def set_aside(self) -> Path | None:
        """Move the files of an earlier run of this name to `SAVE_NAME-previous/`.

        One earlier run is kept. Returns the folder if there was one.
        """
        earlier = [p for p in self._folder.glob(f"{self._name}-*") if p.is_file()]
        own = ("-best.pt", "-best.json", "-last.pt", "-last.json", "-state.pt", "-log.jsonl")
        earlier = [
            p for p in earlier if p.name.removeprefix(self._name).removeprefix("-delta") in own
        ]
        if not earlier:
            return None
        previous = self._folder / f"{self._name}-previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for path in earlier:
            path.rename(previous / path.name)
        return previous

    def save_weights(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """A delta file, or a native checkpoint (fp16 if the config says half)."""
        if self._identity.delta is not None:
            delta.save(path, tensors, self._identity.delta, self._identity.base_fingerprint)
            return
        config = self._identity.config
        if config.half:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        save_tensors(path, tensors)
        note = {
            "config": config.to_dict(),
            "vocab": self._identity.vocabulary,
            "base_fingerprint": self._identity.base_fingerprint,
            "written_by": f"cpm_bee {__version__}",
        }
        with atomic_file(path.with_suffix(".json")) as file:
            file.write(json.dumps(note, indent=2) + "\n")

    def save_state(self, engine: dict[str, Any], progress: dict[str, Any]) -> None:
        state = {
            "engine": engine,
            "progress": progress,
            "base_fingerprint": self._identity.base_fingerprint,
        }
        save_tensors(self.state, state)

    def load_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The (engine, progress) of `save_state`. Raises `InputError` if it is of another run."""
        if not self.state.is_file():
            raise InputError(f"{self.state}: there is no saved state to resume from")
        state = load_tensors(self.state, "a training state")
        if state.get("base_fingerprint") != self._identity.base_fingerprint:
            raise InputError(f"{self.state}: is the state of a run on another base model")
        return state["engine"], state["progress"]
