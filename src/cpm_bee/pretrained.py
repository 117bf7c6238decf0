"""The base model of a run: config, vocabulary and weights, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpm_bee import quantize as quantization
from cpm_bee.checkpoint.config_from_weights import (
    check_agreement,
    derive_config,
    warn_of_contradictions,
)
from cpm_bee.checkpoint.fingerprint import fingerprint_of, sample
from cpm_bee.checkpoint.loading import load_into, set_parameter
from cpm_bee.checkpoint.reader import Checkpoint, LazyTensor
from cpm_bee.checkpoint.sidecar import read_sidecar
from cpm_bee.errors import InputError, Problems
from cpm_bee.files import is_usable_name
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.cache import quantized_entries
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.tokenizer import Tokenizer

AUTO = "auto"
_FETCH = "bash scripts/fetch_vocab.sh gets the vocabulary of the released models"


# Returns an iterator over the tensors of a model, by name.
Tensors = Callable[[], Iterator[tuple[str, LazyTensor]]]


@dataclass(frozen=True)
class PretrainedModel:
    """A model with its vocabulary; `fingerprint` identifies the weights it started from.

    The model that `open_pretrained` returns has no values yet: its tensors are on the meta device,
    in their final dtype, and `tensors` returns their values.
    """

    model: CPMBee
    tokenizer: Tokenizer
    fingerprint: str
    tensors: Tensors

    def materialize(self, device: torch.device) -> None:
        """Load the values onto a device; a checkpoint file is read once, from start to end.

        Tensors that need no change of dtype or device stay memory-mapped (copy-on-write).
        """
        load_into(self.model, self.tensors(), device)

    def materialize_mapped(self) -> None:
        """Load the values memory-mapped, in the dtypes of the file."""
        for name, entry in self.tensors():
            set_parameter(self.model, name, entry.read())


def load_pretrained(
    load: str | None,
    model_config: str,
    vocab: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    quantize: str = quantization.NONE,
    verify: bool = False,
) -> PretrainedModel:
    """Open a model (see `open_pretrained`) and load its values onto a device."""
    pretrained = open_pretrained(
        load, model_config, vocab, dtype, seed=seed, quantize=quantize, verify=verify
    )
    pretrained.materialize(device)
    return pretrained


def open_pretrained(
    load: str | None,
    model_config: str,
    vocab: str | None,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    quantize: str = quantization.NONE,
    verify: bool = False,
) -> PretrainedModel:
    """Open a model, from a checkpoint or with random weights, without reading its values.

    Args:
        load: a checkpoint; None for random weights.
        model_config: a config file, or "auto" to derive it from the checkpoint.
        vocab: a vocabulary file; None looks beside the checkpoint.
        dtype: the dtype of the weights in memory.
        seed: the seed of the random weights.
        quantize: a format of `quantize.CHOICES` for the Linears of a loaded, frozen model.
        verify: compare the checkpoint with its checksums, which reads all of it.

    Raises:
        InputError: checkpoint, config and vocabulary do not match.
    """
    if load is None:
        return _random_pretrained(model_config, vocab, dtype, seed)
    checkpoint = Checkpoint(load, verify=verify)
    sidecar = read_sidecar(checkpoint.path)
    derived = derive_config(checkpoint, sidecar)
    config = derived
    if model_config == AUTO:
        warn_of_contradictions(checkpoint, sidecar, derived)
    else:
        config = ModelConfig.load(model_config)
        check_agreement(config, derived, model_config, checkpoint.path)
    tokenizer = _vocabulary(vocab, checkpoint.path, sidecar, config)
    model = _meta_model(config)
    check_tensors(model, checkpoint)
    entries = checkpoint.entries
    if quantize != quantization.NONE:
        entries = quantized_entries(model, checkpoint, quantize)
    _set_type(model, dtype)
    return PretrainedModel(
        model, tokenizer, checkpoint.fingerprint(), lambda: iter(entries.items())
    )


def _random_pretrained(
    model_config: str, vocab: str | None, dtype: torch.dtype, seed: int
) -> PretrainedModel:
    if model_config == AUTO or vocab is None:
        raise InputError("a random start (no --load) needs --model-config FILE and --vocab FILE")
    config = ModelConfig.load(model_config)
    tokenizer = _checked_vocabulary(Path(vocab), config)
    model = _meta_model(config)
    _refuse_larger_than_memory(model, model_config)
    _set_type(model, dtype)

    def tensors() -> Iterator[tuple[str, LazyTensor]]:
        # From a separate model: `model` may be sharded by then.
        for name, tensor in initial_values(_meta_model(config), seed):
            yield name, LazyTensor.of(tensor)

    samples = (sample(name, tensor) for name, tensor in initial_values(model, seed))
    return PretrainedModel(model, tokenizer, fingerprint_of(samples), tensors)


def _refuse_larger_than_memory(model: CPMBee, source: str) -> None:
    needed = sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise InputError(
            f"{source}: the weights of this model take {needed / 1e9:,.0f} GB, "
            f"this machine has {present / 1e9:,.0f} GB of memory"
        )


def _set_type(model: CPMBee, dtype: torch.dtype) -> None:
    """Set the dtype of all parameters of a model on the meta device, except quantized ones."""
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            for leaf, p in list(module.named_parameters(recurse=False)):
                set_parameter(module, leaf, p.to(dtype))


def _meta_model(config: ModelConfig) -> CPMBee:
    with torch.device("meta"):
        return CPMBee(config)


def _vocabulary(
    vocab: str | None, checkpoint: Path, sidecar: dict[str, Any], config: ModelConfig
) -> Tokenizer:
    if vocab is not None:
        return _checked_vocabulary(Path(vocab), config)
    recorded = sidecar.get("vocab")
    if isinstance(recorded, str) and is_usable_name(recorded) and Path(recorded).is_file():
        return _checked_vocabulary(Path(recorded), config)
    beside = checkpoint.parent / "vocab.txt"
    if not beside.is_file():
        raise InputError(f"no vocabulary: give --vocab FILE, or put it at {beside} ({_FETCH})")
    return _checked_vocabulary(beside, config)


def _checked_vocabulary(path: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{path}: has {len(tokenizer)} tokens, the model has {config.vocab_size}; "
            f"give the model's own with --vocab FILE ({_FETCH})"
        )
    return tokenizer


def check_tensors(model: CPMBee, checkpoint: Checkpoint) -> None:
    """Raise `InputError` if a checkpoint's tensors do not fit the model; all are listed."""
    problems = Problems()
    expected = dict(model.named_parameters())
    for name in sorted({*expected, *checkpoint.entries}):
        if name not in checkpoint.entries:
            problems.add(name, "is missing")
        elif name not in expected:
            problems.add(name, "is unexpected")
        elif checkpoint.entries[name].shape != tuple(expected[name].shape):
            problems.add(
                name,
                f"has shape {list(checkpoint.entries[name].shape)}, "
                f"expected {list(expected[name].shape)}",
            )
    problems.raise_if_any(f"{checkpoint.path}: does not fit the model:")
