"""Converts models between native and Hugging Face form, and deltas to PEFT adapters and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cpm_bee import delta
from cpm_bee.checkpoint import peft_adapter
from cpm_bee.checkpoint.loading import drop_pages
from cpm_bee.checkpoint.model_folder import CONFIG, ModelFolder, check_output, other_fields
from cpm_bee.checkpoint.options import DELTA, HUGGING_FACE, NATIVE, PEFT, SHARD_SIZE, ConvertOptions
from cpm_bee.checkpoint.reader import Checkpoint, LazyTensor
from cpm_bee.checkpoint.sidecar import sidecar_path
from cpm_bee.delta import INFIX, DeltaConfig, DeltaFile
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_folder
from cpm_bee.paths import unwritable_folder
from cpm_bee.pretrained import AUTO, PretrainedModel, open_pretrained

_GIGABYTE = 10**9


@dataclass(frozen=True)
class SourceModel:
    """A model in files: its checkpoint, and what `open_pretrained` makes of it, without values."""

    checkpoint: Checkpoint
    pretrained: PretrainedModel

    @classmethod
    def open(cls, load: str, vocab: str | None) -> SourceModel:
        """Raises `InputError`: the model cannot be loaded."""
        return cls(Checkpoint(load), open_pretrained(load, AUTO, vocab, torch.float32))

    @property
    def form(self) -> str:
        return HUGGING_FACE if self.checkpoint.is_hugging_face else NATIVE

    @property
    def fingerprints(self) -> tuple[str, str]:
        """The fingerprints of weights and vocabulary."""
        return self.pretrained.fingerprint, self.pretrained.tokenizer.fingerprint

    @property
    def entries(self) -> dict[str, LazyTensor]:
        """The tensors in the order of the model, whatever that of the files."""
        names = dict(self.pretrained.model.named_parameters())
        return {name: self.checkpoint.entries[name] for name in names if INFIX not in name}

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors by name; one is in memory at a time."""
        for name, entry in self.entries.items():
            value = entry.read()
            yield name, value
            drop_pages(value)

    def folder(self, form: str, shard_size: float) -> ModelFolder:
        """What a folder with this model, or one of its size, will have."""
        return ModelFolder(
            form=form,
            entries=self.entries,
            config=self.pretrained.model.config,
            vocabulary=Path(self.pretrained.tokenizer.source),
            shard_bytes=int(shard_size * _GIGABYTE),
            other_fields=other_fields(self.checkpoint.path.parent / CONFIG),
        )


def convert(options: ConvertOptions) -> None:
    """Run a conversion.

    Raises:
        InputError: the input cannot be converted, or the output would replace something.
    """
    output = Path(options.output)
    if options.to == DELTA:
        _adapter_to_delta(options, output)
        return
    check_output(output, (options.input, options.load, options.vocab), overwrite=options.overwrite)
    if options.to == PEFT:
        _delta_to_adapter(options, output)
    else:
        _convert_model(options, output)


def _convert_model(options: ConvertOptions, output: Path) -> None:
    if (Path(options.input) / peft_adapter.CONFIG).is_file():
        raise InputError(f"{options.input}: is a PEFT adapter; --to delta makes a delta of it")
    if Path(options.input).is_file() and _is_delta(Path(options.input)):
        raise InputError(
            f"{options.input}: is a delta; --to peft makes an adapter of it, and merge_delta.py "
            "merges it into its base"
        )
    source = SourceModel.open(options.input, options.vocab)
    vocabulary = source.pretrained.tokenizer.source
    check_output(output, (source.checkpoint.path, vocabulary), overwrite=options.overwrite)
    with atomic_folder(output, replace=options.overwrite) as folder:
        target = source.folder(options.to, options.shard_size or SHARD_SIZE)
        target.write(folder, source.values())


def _is_delta(path: Path) -> bool:
    try:
        DeltaFile.read(path, alpha=DeltaConfig.alpha)
    except InputError:
        return False
    return True


def _delta_to_adapter(options: ConvertOptions, output: Path) -> None:
    if Path(options.input).is_dir():
        raise InputError(f"{options.input}: is a folder; --to peft needs a delta file")
    file = DeltaFile.read(options.input, alpha=options.delta_alpha)
    file = _checked(file, options)
    with atomic_folder(output, replace=options.overwrite) as folder:
        peft_adapter.write_adapter(folder, file, options.load)


def _adapter_to_delta(options: ConvertOptions, output: Path) -> None:
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; --to delta needs the name of a file")
    if reason := unwritable_folder(output.parent):
        raise InputError(f"--output {output}: {reason}")
    existing = [path for path in (output, sidecar_path(output)) if path.exists()]
    inputs = [p for p in Path(options.input).glob("*") if any(p.samefile(e) for e in existing)]
    if inputs:
        raise InputError(
            f"--output {output}: would replace {inputs[0]}, which is read; give another --output"
        )
    if existing and not options.overwrite:
        raise InputError(
            f"--output {output}: {existing[0]} already exists; replace it with --overwrite, or "
            "give another --output"
        )
    file = _checked(peft_adapter.read_adapter(Path(options.input)), options)
    prints = (file.base_fingerprint, file.vocabulary_fingerprint)
    delta.save(output, file.tensors, file.config, *prints)


def _checked(file: DeltaFile, options: ConvertOptions) -> DeltaFile:
    """With `--load`: check that a delta fits that base, and record the base's fingerprints."""
    if options.load is None:
        return file
    base = SourceModel.open(options.load, options.vocab)
    file.check_base(*base.fingerprints)
    file.insert_into(base.pretrained.model)
    fingerprint, vocabulary = base.fingerprints
    return replace(file, base_fingerprint=fingerprint, vocabulary_fingerprint=vocabulary)
