"""The delta that a run begins with: a new one, that of `--init-delta`, or that of its state."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpm_bee.delta import DeltaConfig, DeltaFile
from cpm_bee.delta import insert as insert_new_delta
from cpm_bee.errors import Problems
from cpm_bee.pretrained import PretrainedModel
from cpm_bee.train.options import ALWAYS, AUTO, NEVER, Options
from cpm_bee.train.saved_state import saved_delta_config


class InitialDelta:
    """The settings of the delta of a run, and its first values where a file has them.

    A resumed run gets its values from its state. `--init-delta` may then name a file that is gone
    or is another one by now, such as the last weights of this run itself.

    Raises:
        InputError: the delta file cannot be read, or flags contradict it.
    """

    def __init__(self, options: Options) -> None:
        self.file: DeltaFile | None = None
        found, source = DeltaConfig(), ""
        if options.init_delta is not None and begins_with_file(options):
            self.file = DeltaFile.read(options.init_delta, alpha=options.delta_alpha)
            found, source = self.file.config, options.init_delta
        elif options.init_delta is not None:
            path = None if options.resume == ALWAYS else Path(options.resume)
            saved = saved_delta_config(options.save, options.save_name, path)
            if saved is not None:
                found, source = saved, "the saved state"
        given: dict[str, Any] = {
            "rank": options.delta_rank,
            "alpha": options.delta_alpha,
            "targets": options.delta_targets,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if source:
            _refuse_contradictions(found, replace(found, **given), source)
            given = {}
        self.config = replace(found, **given, dropout=options.delta_dropout)

    def insert_into(self, pretrained: PretrainedModel, seed: int) -> None:
        """Insert it into a model without values.

        Raises:
            InputError: the delta file was trained on another base, or does not fit.
        """
        model = pretrained.model
        if self.file is None:
            insert_new_delta(model, self.config, seed)
            return
        self.file.check_base(pretrained.fingerprint, pretrained.tokenizer.fingerprint)
        self.file.insert_into(model, dropout=self.config.dropout)


def begins_with_file(options: Options) -> bool:
    """Whether the values of `--init-delta` are needed: those of a state replace them.

    With `--resume auto` it is not known yet whether there is a state that can be used.
    """
    if options.init_delta is None:
        return False
    return options.resume == NEVER or (
        options.resume == AUTO and Path(options.init_delta).is_file()
    )


def _refuse_contradictions(found: DeltaConfig, given: DeltaConfig, source: str) -> None:
    problems = Problems()
    for name in ("rank", "alpha"):
        if getattr(given, name) != getattr(found, name):
            problems.add(
                f"--delta-{name} {getattr(given, name):g}",
                f"{source} has {getattr(found, name):g}; leave out the flag",
            )
    if set(given.targets) != set(found.targets):
        problems.add(
            f"--delta-targets {','.join(given.targets)}",
            f"{source} has {','.join(found.targets)}; leave out the flag",
        )
    problems.raise_if_any("--init-delta: flags contradict the delta that the run begins with:")


def digest_of(delta: str) -> int:
    """A number that tells whether processes have the same delta file."""
    return int(hashlib.sha256(Path(delta).read_bytes()).hexdigest()[:15], 16)


def init_delta_line(options: Options, is_resumed: bool) -> list[str]:
    """What a run says about its `--init-delta`."""
    if options.init_delta is None or is_resumed:
        return []
    return [f"the delta begins as {options.init_delta}"]
