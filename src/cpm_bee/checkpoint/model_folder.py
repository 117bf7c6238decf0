"""Writes a model as a folder: weights, config and vocabulary, in native or Hugging Face form."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cpm_bee.checkpoint.options import HUGGING_FACE
from cpm_bee.checkpoint.reader import PREFIX, LazyTensor
from cpm_bee.checkpoint.writer import StoredTensor, write_safetensors, write_torch_file
from cpm_bee.disk import open_to_write
from cpm_bee.errors import InputError
from cpm_bee.model.config import ModelConfig
from cpm_bee.paths import unwritable_folder
from cpm_bee.progress import progress_bar

CONFIG, VOCABULARY = "config.json", "vocab.txt"
_NATIVE = "pytorch_model.bin"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What a folder that may be replaced consists of: the files of a model or an adapter.
_OURS = re.compile(
    r"pytorch_model\.bin|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"(config|adapter_config)\.json|vocab\.txt|adapter_model\.safetensors|"
    r"(pytorch_model|model)\.(nf4|int8)\.safetensors"
)


def check_output(output: Path, inputs: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Refuse an output folder that would replace something else than an earlier result.

    Raises:
        InputError: it cannot be made, it exists and `overwrite` is false, it has other files than
            a model or an adapter, or one of the inputs is in it.
    """
    place = Path(os.path.realpath(output))  # `resolve` would raise for a loop of links
    for path in inputs:
        read = None if path is None else Path(os.path.realpath(path))
        if read is not None and place in (read, *read.parents):
            raise InputError(
                f"--output {output}: holds {path}, which is read; its contents would be replaced: "
                "give another --output"
            )
    if reason := unwritable_folder(output):
        raise InputError(f"--output {output}: {reason}")
    if not place.exists():
        return
    others = sorted(p.name for p in place.iterdir() if not _OURS.fullmatch(p.name))
    if others:
        raise InputError(
            f"--output {output}: holds other files than a model ({others[0]}), so it is not "
            "replaced; give a new folder"
        )
    if not overwrite:
        raise InputError(
            f"--output {output}: already exists; replace it with --overwrite, or give another "
            "--output"
        )


@dataclass(frozen=True)
class ModelFolder:
    """What a folder with a model will have.

    Attributes:
        form: `NATIVE` or `HUGGING_FACE`.
        entries: the tensors' shapes and types by native name, in the order of the file.
        vocabulary: the vocabulary file.
        shard_bytes: the largest size of a file with weights in Hugging Face form; a tensor that
            is larger is in a file by itself.
        other_fields: fields of a Hugging Face config that this project does not know.
    """

    form: str
    entries: dict[str, LazyTensor]
    config: ModelConfig
    vocabulary: Path
    shard_bytes: int
    other_fields: dict[str, Any]

    def write(self, folder: Path, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the files.

        Args:
            folder: an existing folder.
            values: the values by native name, in the order of `entries`; one is in memory at a
                time.
        """
        with progress_bar(total=self._num_bytes, description="writing", unit="B") as bar:

            def counted() -> Iterator[tuple[str, torch.Tensor]]:
                for name, value in values:
                    yield name, value
                    bar.update(value.nbytes)

            if self.form == HUGGING_FACE:
                self._write_hugging_face(folder, counted())
            else:
                with open_to_write(folder / _NATIVE, "wb") as file:
                    write_torch_file(file, self._stored(""), counted())
        _write_json(folder / CONFIG, self._config())
        shutil.copyfile(self.vocabulary, folder / VOCABULARY)

    @property
    def _num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._stored(""))

    def _stored(self, prefix: str) -> list[StoredTensor]:
        return [StoredTensor(prefix + n, e.shape, e.dtype) for n, e in self.entries.items()]

    def _config(self) -> dict[str, Any]:
        if self.form != HUGGING_FACE:
            return self.config.to_dict()
        types = {entry.dtype for entry in self.entries.values()}
        values: dict[str, Any] = {"architectures": ["CpmBeeForCausalLM"], "model_type": "cpmbee"}
        if len(types) == 1:
            values["torch_dtype"] = str(*types).removeprefix("torch.")
        return {**values, **self.other_fields, **self.config.to_hugging_face()}

    def _write_hugging_face(self, folder: Path, values: Iterator[tuple[str, torch.Tensor]]) -> None:
        # lm_head.weight is left out, as Hugging Face leaves out tensors that are tied to others.
        shards = split_into_shards(self._stored(PREFIX), self.shard_bytes)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            name = _WHOLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            own = ((PREFIX + native, value) for native, value in islice(values, len(shard)))
            with open_to_write(folder / name, "wb") as file:
                write_safetensors(file, shard, own, {"format": "pt"})
            weight_map |= {tensor.name: name for tensor in shard}
        if len(shards) > 1:
            metadata = {"total_size": self._num_bytes}
            _write_json(folder / _INDEX, {"metadata": metadata, "weight_map": weight_map})


def split_into_shards(stored: Sequence[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    """Divide tensors, in their order, into shards of at most `shard_bytes` or one tensor."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in stored:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def other_fields(config: Path) -> dict[str, Any]:
    """The fields of a Hugging Face config file that this project does not know."""
    if not config.is_file():
        return {}
    values = ModelConfig.read(config)
    if "hidden_size" not in values:
        return {}
    return {name: v for name, v in values.items() if not ModelConfig.native_names({name: 0})}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    with open_to_write(path) as file:
        file.write(text + "\n")
