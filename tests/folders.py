"""Models and deltas in files, for tests of conversion and merging."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import train_support

from cpm_bee import delta
from cpm_bee.checkpoint.reader import Checkpoint, load_tensors, save_tensors
from cpm_bee.data.batch import Batch, collate
from cpm_bee.delta import DeltaConfig
from cpm_bee.encoding import Encoder
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import PretrainedModel, load_pretrained
from cpm_bee.tokenizer import Tokenizer

PRUNED: dict[str, Any] = {
    "num_layers": 3,
    "mask_modules": ((True, False), (False, True), (False, False)),
}


def make_base(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a native model folder; returns it."""
    half = dtype == torch.float16
    train_support.make_model(folder, replace(train_support.CONFIG, half=half, **changes))
    path = folder / "pytorch_model.bin"
    save_tensors(path, {n: t.to(dtype) for n, t in load_tensors(path, "a model").items()})
    return folder


def load(folder: Path) -> PretrainedModel:
    return load_pretrained(str(folder), "auto", None, torch.float32, torch.device("cpu"))


def tuned(base: Path, config: DeltaConfig, seed: int = 0) -> CPMBee:
    """A model with a delta whose B is not zero."""
    model = load(base).model.eval()
    delta.insert(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def make_delta(path: Path, base: Path, config: DeltaConfig, seed: int = 0) -> Path:
    """Write a delta file that belongs to a base."""
    model, found = tuned(base, config, seed), load(base)
    prints = (found.fingerprint, found.tokenizer.fingerprint)
    delta.save(path, delta.tensors(model), config, *prints)
    return path


def batch() -> Batch:
    tokenizer = Tokenizer(train_support.TOKENS, source="test")
    encoder = Encoder(tokenizer)
    return collate([encoder.encode(r) for r in train_support.records(6, seed=5)], tokenizer)


def bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The tensors of a model by native name, with their types and bytes."""
    found = {}
    for name, entry in Checkpoint(folder).entries.items():
        value = entry.read().contiguous()
        raw = value.view(-1).view(torch.uint8).numpy().tobytes()
        found[name] = (value.dtype, tuple(value.shape), raw)
    return found


def read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def printed_command(output: str) -> list[str]:
    """The command that a script prints as the next one, with this interpreter."""
    (command,) = re.findall(r"^next, .*: (cd .*)$", output, re.M)
    return ["sh", "-c", command.replace(" python ", f" {sys.executable} ")]
