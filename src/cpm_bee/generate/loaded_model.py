"""The model that a command answers with: base, delta, device and type, from its flags."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpm_bee import delta, pretrained
from cpm_bee.engine.device import choose_device, choose_dtype, own_gpu, use_device
from cpm_bee.generate.options import LoadedModelOptions
from cpm_bee.pretrained import PretrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A base model on its device, to which a delta can be added.

    Attributes:
        settings: the flags that identify the model, with their values; grows with the delta.
    """

    base: PretrainedModel
    device: torch.device
    settings: dict[str, Any] = field(default_factory=dict)

    def add_delta(self, path: str, alpha: float | None = None) -> None:
        """Insert a delta file into the model.

        Args:
            alpha: of a delta that does not record it.

        Raises:
            InputError: the delta belongs to another base or vocabulary, or is not a delta.
        """
        prints = (self.base.fingerprint, self.base.tokenizer.fingerprint)
        config = delta.load(self.base.model, path, *prints, alpha=alpha)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.settings.update({"--delta": _shortened(digest), "--delta-alpha": config.alpha})


def load_base(options: LoadedModelOptions) -> LoadedModel:
    """Load the base model, without `--delta`.

    Raises:
        InputError: a flag cannot be used on this machine, or checkpoint, config and vocabulary do
            not match.
    """
    device = use_device(own_gpu(choose_device(options.device)))
    dtype = choose_dtype(options.dtype, device)
    files = (options.load, options.model_config, options.vocab)
    base = pretrained.load_pretrained(
        *files, dtype, device, quantize=options.quantize, verify=options.verify
    )
    settings = {
        "--dtype": str(dtype).removeprefix("torch."),
        "--device": device.type,
        "--quantize": options.quantize,
        "--load": _shortened(base.fingerprint),
        "--vocab": _shortened(base.tokenizer.fingerprint),
    }
    return LoadedModel(base, device, settings)


def load_model(options: LoadedModelOptions) -> LoadedModel:
    """Load the model with its delta, if one is given; raises as `load_base` and `add_delta`."""
    loaded = load_base(options)
    if options.delta is not None:
        loaded.add_delta(options.delta, options.delta_alpha)
    return loaded


def _shortened(digest: str) -> str:
    return f"fingerprint {digest[:12]}"
