"""What a run is made from: it is recorded in its states, and has to be the same to resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.data_size import IN_CONTEXT, NO_SAMPLES
from cpm_bee.train.training_state import LOSS

logger = logging.getLogger(__name__)

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

    def recorded(self) -> dict[str, Any]:
        """Returns what a training state records of it."""
        return {
            "delta": self._delta(),
            "base_fingerprint": self.base_fingerprint,
            "metric_for_best": self.metric_for_best,
            **self._sets(),
        }

    def _sets(self) -> dict[str, str]:
        """Returns the fingerprints that are not in states of earlier versions."""
        return {
            "vocabulary_fingerprint": self.vocabulary_fingerprint,
            "evaluation_fingerprint": self.evaluation_fingerprint,
        }

    def _delta(self) -> dict[str, Any]:
        config = self.delta
        return {} if config is None else {**asdict(config), "targets": list(config.targets)}

    def check(self, path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Check that a run can resume from a state; warns of what the state does not record.

        Args:
            path: of the state, for messages.
            settings: of the run, which must be those of the state.

        Raises:
            InputError: the state is that of another base, or there are differences; all are listed.
        """
        if state.get("base_fingerprint") != self.base_fingerprint:
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
        metric, before = self.metric_for_best, state.get("metric_for_best", LOSS)
        if metric != before:
            problems.add("--metric-for-best", f"{metric}, it was {shown(before)}")
        for name, value in settings.items():
            older = NO_SAMPLES if name == IN_CONTEXT else _NOT_RECORDED
            before = state["settings"].get(name, older)
            if before != value:
                problems.add(name, f"{value}, it was {before}")
        problems.raise_if_any(f"{path}: --resume needs the same as before:")
