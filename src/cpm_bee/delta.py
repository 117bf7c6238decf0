"""Delta tuning: insert LoRA into a model, save it and load it (docs/format.md §7)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cpm_bee.checkpoint.loading import copy_values
from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.checkpoint.sidecar import (
    METADATA,
    metadata_tensor,
    read_metadata,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee
from cpm_bee.paths import not_a_file

logger = logging.getLogger(__name__)

# The Linear layers that can carry a delta, by the last part of their name.
TARGETS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")

INFIX = ".lora."  # between the name of a Linear and that of its A or B
# What a delta file and its sidecar both record.
_RECORDED = ("rank", "alpha", "targets", "base_fingerprint", "vocabulary_fingerprint")


@dataclass(frozen=True)
class DeltaConfig:
    """Settings of the delta (alpha/r) (x Aᵀ) Bᵀ: rank r, alpha, target layers, dropout of x."""

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("project_q", "project_v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            raise InputError(
                f"--delta-targets: {', '.join(unknown) or 'nothing'} is not a layer of the model; "
                f"choose from {', '.join(TARGETS)}"
            )


class LoRA(nn.Module):
    """The low-rank path beside a Linear; unlike the base path, not divided by sqrt(dim_in)."""

    def __init__(self, linear: Linear, config: DeltaConfig) -> None:
        super().__init__()
        dim_in, dim_out = linear.dim_in, linear.dim_out
        # Always fp32: in 16 bit, most updates at a small learning rate would round to nothing.
        device = linear.operands()[0].device  # a quantized layer has no weight
        if device.type == "meta":
            device = torch.device("cpu")  # the base is loaded later, but these values are set now
        self.lora_A = nn.Parameter(torch.empty(config.rank, dim_in, device=device))
        self.lora_B = nn.Parameter(torch.empty(dim_out, config.rank, device=device))
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set A to Kaiming-uniform with a = sqrt(5), i.e. U(±1/sqrt(dim_in)), and B to zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        values = torch.rand(self.lora_A.shape, generator=generator) * 2 - 1
        self.lora_A.copy_(values * bound)
        self.lora_B.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)
        y = F.linear(F.linear(self.dropout(y), self.lora_A), self.lora_B) * self.scale
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def insert(model: CPMBee, config: DeltaConfig, seed: int) -> None:
    """Freeze the model and add a trainable LoRA to each target layer."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    for name, linear in linears:
        linear.lora = None  # removes an earlier delta
        if name.rpartition(".")[2] in config.targets:
            lora = LoRA(linear, config)
            lora.initialize(generator)
            linear.lora = lora.train(linear.training)


def tensors(model: CPMBee) -> dict[str, torch.Tensor]:
    """The delta's tensors by the names they have in a delta file (docs/format.md §7)."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if INFIX in name}


def save(
    path: Path,
    values: dict[str, torch.Tensor],
    config: DeltaConfig,
    base_fingerprint: str | None,
    vocabulary_fingerprint: str | None,
) -> None:
    """Write a delta file with its settings and its base, and the same in a `.json` sidecar.

    A fingerprint that is None, because it is not known, is not recorded.
    """
    settings: dict[str, Any] = {
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": list(config.targets),
    }
    if base_fingerprint is not None:
        settings["base_fingerprint"] = base_fingerprint
    recorded = dict(settings)
    if vocabulary_fingerprint is not None:
        recorded["vocabulary_fingerprint"] = vocabulary_fingerprint
    save_tensors(path, {**values, METADATA: metadata_tensor(recorded)})
    write_sidecar(path, settings)


@dataclass(frozen=True)
class DeltaFile:
    """A delta file in memory; fingerprints are None where the file does not record them."""

    path: Path
    config: DeltaConfig
    tensors: dict[str, torch.Tensor]
    base_fingerprint: str | None
    vocabulary_fingerprint: str | None

    @classmethod
    def read(cls, path: str | Path, *, alpha: float | None = None) -> DeltaFile:
        """Read a delta file made by this or another CPM-Bee tool.

        Rank and targets are read from the tensors. If neither the file nor its sidecar records
        alpha, it is `alpha` or, with a warning, 16.

        Raises:
            DamagedFile: it has changed since it was written.
            InputError: it is not a delta file, was trained with another alpha, or its sidecar
                contradicts it.
        """
        path = Path(path)
        if reason := not_a_file(path, "delta file"):
            raise InputError(f"{path}: {reason}")
        loaded = load_tensors(path, "a delta file", verify=True)
        recorded = _recorded(path, loaded)
        return cls.of(path, loaded, recorded, alpha=alpha)

    @classmethod
    def of(
        cls,
        path: Path,
        tensors: dict[str, Any],
        recorded: dict[str, Any],
        *,
        alpha: float | None = None,
    ) -> DeltaFile:
        """Make it from tensors by the names of a delta file, and what is recorded of them."""
        config = _config_of(path, tensors, recorded, alpha)
        base, vocabulary = (recorded.get(f"{of}_fingerprint") for of in ("base", "vocabulary"))
        return cls(path, config, tensors, base, vocabulary)

    def check_base(self, base_fingerprint: str, vocabulary_fingerprint: str) -> None:
        """Raise `InputError` if the delta was trained on another base or vocabulary."""
        base, vocabulary = self.base_fingerprint, self.vocabulary_fingerprint
        if base is not None and base != base_fingerprint:
            raise InputError(
                f"{self.path}: was trained on another base model (fingerprint {str(base)[:12]}..., "
                f"the loaded one has {base_fingerprint[:12]}...); name its own base with --load"
            )
        if vocabulary is not None and vocabulary != vocabulary_fingerprint:
            raise InputError(
                f"{self.path}: was trained with another vocabulary (fingerprint "
                f"{str(vocabulary)[:12]}..., the loaded one has "
                f"{vocabulary_fingerprint[:12]}...); name its own with --vocab"
            )

    def insert_into(self, model: CPMBee, *, dropout: float = 0.0) -> None:
        """Insert the delta into a model, in place of an earlier one.

        Raises:
            InputError: tensors do not fit the model (all are listed).
        """
        # Before anything is inserted: one tensor of a huge rank would claim it for all layers.
        expected = _shapes(model, self.config)
        problems = Problems()
        for name in sorted({*self.tensors, *expected}):
            if name not in self.tensors:
                problems.add(name, "is missing")
            elif name not in expected:
                problems.add(name, "is unexpected")
            elif self.tensors[name].shape != expected[name]:
                problems.add(
                    name,
                    f"has shape {list(self.tensors[name].shape)}, expected {list(expected[name])}",
                )
        problems.raise_if_any(f"{self.path}: does not fit the model:")
        insert(model, replace(self.config, dropout=dropout), seed=0)
        parameters = dict(model.named_parameters())
        for name, value in self.tensors.items():
            copy_values(parameters[name], value)


def load(
    model: CPMBee,
    path: str | Path,
    base_fingerprint: str,
    vocabulary_fingerprint: str,
    *,
    alpha: float | None = None,
) -> DeltaConfig:
    """Load a delta file into a model; see `DeltaFile` for what is checked.

    Raises:
        DamagedFile: the file has changed since it was written.
        InputError: the file cannot be used with this model.
    """
    file = DeltaFile.read(path, alpha=alpha)
    file.check_base(base_fingerprint, vocabulary_fingerprint)
    file.insert_into(model)
    return file.config


def _shapes(model: CPMBee, config: DeltaConfig) -> dict[str, tuple[int, int]]:
    """The shapes of a delta's tensors by name."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in config.targets:
            shapes[f"{name}{INFIX}lora_A"] = (config.rank, module.dim_in)
            shapes[f"{name}{INFIX}lora_B"] = (module.dim_out, config.rank)
    return shapes


def _recorded(path: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """What a delta file and its sidecar record, which must agree; leaves the tensors alone."""
    sidecar = read_sidecar(path)
    metadata = read_metadata(path, loaded.pop(METADATA)) if METADATA in loaded else {}
    beside = sidecar_path(path)
    for source, values in ((beside, sidecar), (path, metadata)):
        alpha = values.get("alpha", DeltaConfig.alpha)
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not 0 < alpha < math.inf:
            raise InputError(f"{source}: alpha {shown(alpha)} is not a number above 0")
    problems = Problems()
    for name in _RECORDED:
        if name in sidecar and name in metadata and sidecar[name] != metadata[name]:
            problems.add(name, f"{shown(sidecar[name])}, in the delta {shown(metadata[name])}")
    problems.raise_if_any(
        f"{beside}: does not describe {path}, which records other values itself:",
        f"put the delta's own sidecar there, or move this one elsewhere (mv {beside} "
        f"{beside}.unused): the delta needs none",
    )
    return {**sidecar, **metadata}


def _config_of(
    path: Path, loaded: dict[str, Any], recorded: dict[str, Any], alpha: float | None
) -> DeltaConfig:
    if not all(_is_matrix(name, value) for name, value in loaded.items()):
        raise InputError(f"{path}: not a delta file, which contains only named matrices")
    ending = f"{INFIX}lora_A"
    lora_a = {name.removesuffix(ending): v for name, v in loaded.items() if name.endswith(ending)}
    targets = {name.rpartition(".")[2] for name in lora_a} & set(TARGETS)
    if not targets:
        raise InputError(
            f"{path}: not a delta file: it has no tensors named LAYER{ending} "
            f"with a layer of {', '.join(TARGETS)}"
        )
    ranks = {value.shape[0] for value in lora_a.values()}
    if len(ranks) > 1:
        raise InputError(f"{path}: holds LoRA of several ranks {sorted(ranks)}, expected one")
    (rank,) = ranks
    if recorded.get("rank", rank) != rank:
        raise InputError(
            f"{path}: records rank {shown(recorded['rank'])}, its tensors have rank {rank}; "
            "put an intact copy of it and its .json there"
        )
    known = recorded.get("alpha")
    if alpha is not None and known not in (None, alpha):
        raise InputError(
            f"--delta-alpha {alpha:g}: {path} was trained with alpha {known:g}, which it records; "
            "leave out the flag"
        )
    if alpha is None and known is None:
        logger.warning(
            f"{path} does not record its alpha, and has no {sidecar_path(path).name} beside it: "
            f"alpha {DeltaConfig.alpha:g} is assumed; if it was trained with another one, give "
            "that with --delta-alpha"
        )
    alpha = next(a for a in (known, alpha, DeltaConfig.alpha) if a is not None)
    return DeltaConfig(rank=rank, alpha=alpha, targets=tuple(sorted(targets)))


def _is_matrix(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and torch.is_tensor(value)
        and value.dim() == 2
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )
