"""What a run reads, as its receipt has it: paths, fingerprints and hashes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpm_bee.checkpoint.reader import checkpoint_file, files_of
from cpm_bee.checkpoint.verification import sha256_of
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.mixture import Mixture, Part
from cpm_bee.train.checks import Inputs
from cpm_bee.train.hashes import (
    SHA256,
    BackgroundHashes,
    quick_hash,
    quick_hash_of_dataset,
    whole_hash,
)
from cpm_bee.train.initial_delta import begins_with_file
from cpm_bee.train.options import Options


class InputHashes:
    """What a run reads, with hashes: at once for small files, in the background for large ones."""

    def __init__(self, options: Options, inputs: Inputs) -> None:
        pretrained = inputs.pretrained
        self._sets = {flag: _datasets(dataset) for flag, dataset in inputs.datasets.items()}
        self._base: Path | None = None if options.load is None else checkpoint_file(options.load)
        files = [] if self._base is None else files_of(self._base)
        self._quick = {path: quick_hash(path) for path in files}
        of_sets = [d for parts in self._sets.values() for _, d in parts]
        self._quick_sets = {d.folder: quick_hash_of_dataset(d) for d in of_sets}
        self._fingerprints = {d.folder: d.fingerprint for d in of_sets}
        slow = [path for path, found in self._quick.items() if found is None]
        slow += [p for d in of_sets if self._quick_sets[d.folder] is None for p in d.paths]
        self.background = BackgroundHashes(slow)
        self._vocabulary = {
            "path": os.path.abspath(pretrained.tokenizer.source),
            "tokens": len(pretrained.tokenizer),
            "fingerprint": pretrained.tokenizer.fingerprint,
        }
        self._fingerprint = pretrained.fingerprint
        self._delta = None
        if options.init_delta is not None and begins_with_file(options):
            path = Path(options.init_delta)
            self._delta = {"path": os.path.abspath(path), "sha256": sha256_of(path, "")}

    def current(self) -> dict[str, Any]:
        """Returns all inputs with the hashes that are known by now."""
        known = dict(self.background.found)
        files = []
        for path, found in self._quick.items():
            later = {"kind": SHA256, "value": known[path]} if path in known else {}
            files.append({"name": path.name, "bytes": path.stat().st_size, **(found or later)})
        data = {}
        for flag, parts in self._sets.items():
            data[flag.removeprefix("--")] = [self._dataset(part, d, known) for part, d in parts]
        base = None if self._base is None else os.path.abspath(self._base)
        return {
            "data": data,
            "vocabulary": self._vocabulary,
            "base": {"path": base, "fingerprint": self._fingerprint, "files": files},
            "init_delta": self._delta,
        }

    def _dataset(
        self, part: Part, dataset: BinaryDataset, known: dict[Path, str]
    ) -> dict[str, Any]:
        found = self._quick_sets[dataset.folder] or whole_hash(dataset.paths, known) or {}
        return {
            "path": os.path.abspath(dataset.folder),
            "weight": part.weight,
            "records": len(dataset),
            "fingerprint": self._fingerprints[dataset.folder],
            **found,
        }


def _datasets(dataset: BinaryDataset | Mixture) -> list[tuple[Part, BinaryDataset]]:
    if isinstance(dataset, Mixture):
        return list(zip(dataset.parts, dataset.datasets, strict=True))
    return [(Part(str(dataset.folder), 1.0), dataset)]
