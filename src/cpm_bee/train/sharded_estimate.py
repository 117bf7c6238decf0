"""Peak memory of one of several processes that divide a model with FSDP2.

The passes are the real ones through a whole model, on tensors without values, as in
`memory_estimate`. What FSDP holds instead of the whole model is computed. Beside its part of
weights, gradients and moments, a process holds

- until the first layer begins, twice what is outside the layers (the embedding above all), as it is
  gathered into a flat buffer and copied from there; the first layer is gathered then too;
- for the rest of the pass, what is outside the layers, and its gradients once there are some;
- two layers, the one that computes and the buffer of a gathered one, in the type of `engine.fsdp`;
  after the last one, that buffer;
- when a layer's backward pass ends, its gradients, and a flat fp32 copy of them to be summed;
- when a backward pass ends, such a copy of the gradients outside the layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpm_bee.checkpoint.loading import set_parameter
from cpm_bee.data.batch import Batch
from cpm_bee.model.config import ModelConfig
from cpm_bee.train.live_storages import LiveStorages
from cpm_bee.train.memory_estimate import (
    MemoryEstimate,
    TrainingSetup,
    meta_model,
    set_parameters,
)

# The stages of a pass: until the first layer, to the end of the last one, and so on.
_STAGES = ("before", "forward", "loss", "backward of loss", "backward", "end")
_BEFORE, _FORWARD, _LOSS, _LOSS_BACKWARD, _BACKWARD, _END = _STAGES


def estimate_sharded(
    config: ModelConfig, training: TrainingSetup, batch: Batch, shards: int
) -> MemoryEstimate:
    """Estimates the peak of a training step of one of `shards` processes; see `estimate`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ShardedModel(config, training, shards)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with LiveStorages(fake) as live:
        model.begin(live, fake)
        rest = model.train(batch)
    return MemoryEstimate(model.weights, model.gradients, model.moments, rest)


class ShardedModel:
    """A model of which a process holds a part.

    Attributes:
        weights, gradients, moments: bytes of the part.
        trained: bytes of the whole trained tensors, in fp32.
        largest: bytes of the largest of them.
        root: bytes outside the layers, gathered.
    """

    def __init__(self, config: ModelConfig, training: TrainingSetup, shards: int) -> None:
        self._model = model = meta_model(config, training)
        self._layers = layers = list(model.encoder.layers)
        self._dtype, self._shards = training.dtype, shards
        set_parameters(model, training, _on_meta)
        trained, inside = _trained(model), [_trained(layer) for layer in layers]
        self.trained = 4 * trained
        self.largest = 4 * max(p.numel() for p in model.parameters() if p.requires_grad)
        self.weights = sum(p.nbytes for p in model.parameters()) // shards
        self.gradients, self.moments = 4 * trained // shards, 2 * 4 * trained // shards
        self._outside, self._first = 4 * (trained - sum(inside)), 4 * inside[0]
        if training.delta is None:
            for layer in layers:
                set_parameters(layer, replace(training, held=training.dtype), _on_meta)
        gathered = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        self.root = sum(p.nbytes for p in model.parameters()) - sum(gathered)
        self._all_layers, self._two_layers = sum(gathered), 2 * max(gathered)
        self._reduced = max(
            sum(p.nbytes + 4 * p.numel() for p in layer.parameters() if p.requires_grad)
            for layer in layers
        )

    def begin(self, live: LiveStorages, fake: Any) -> None:
        """Make the whole model, whose tensors `live` counts from now on."""
        self._live = live
        for name, p in list(self._model.named_parameters()):
            with fake:
                set_parameter(self._model, name, torch.empty(p.shape, dtype=p.dtype, device="cpu"))
        for layer in self._layers:
            for p in layer.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._reduce)
        self._whole = live.live
        self._layers[0].register_forward_pre_hook(self._begin_layers)
        self._layers[-1].register_forward_hook(self._end_forward)

    def _reduce(self, parameter: torch.Tensor) -> None:
        """Keep this process's part of a layer's gradient; the whole one is in `_reduced`."""
        parameter.grad = None
        part = torch.empty(parameter.numel() // self._shards)
        self._parts.append(part)

    def _begin_pass(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._stage, self._peaks = _BEFORE, dict.fromkeys(_STAGES, 0)
        self._live.peak = self._live.live

    def _enter(self, stage: str) -> None:
        self._peaks[self._stage] = self._live.peak - self._whole
        self._stage, self._live.peak = stage, self._live.live

    # With checkpointing, layers run again in the backward pass.
    def _begin_layers(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._stage == _BEFORE:
            self._enter(_FORWARD)
            before = self._live.live - self._whole + self._two_layers
            self._peaks[_BEFORE] = max(self._peaks[_BEFORE], before)
            if args[0].requires_grad:
                args[0].register_hook(lambda _: self._enter(_END))

    def _end_forward(self, layer: nn.Module, args: object, output: torch.Tensor) -> None:
        if self._stage == _FORWARD:
            self._enter(_LOSS)
            if output.requires_grad:
                output.register_hook(lambda _: self._enter(_BACKWARD))

    @property
    def kept(self) -> int:
        """Bytes that earlier passes have left, in `buffer_pool`."""
        return self._live.live - self._whole

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32)

    def train(self, batch: Batch) -> int:
        """Run a forward and a backward pass; returns the peak besides weights and trained state."""
        self._begin_pass()
        with self._autocast():
            loss = self._model.loss(batch)
        self._enter(_LOSS_BACKWARD)
        (loss / batch.num_targets).backward()
        del loss
        self._enter(_END)
        peaks, root, end = self._peaks, self.root, self._live.live - self._whole
        for p in self._model.parameters():
            p.grad = None
        self._parts.clear()
        # From the backward pass on, the gradients that there are already are in the peaks, and
        # those of the last step are gone.
        return max(
            peaks[_BEFORE] + 2 * root,
            peaks[_FORWARD] + root + self._two_layers,
            peaks[_LOSS] + root + self._two_layers // 2,
            peaks[_LOSS_BACKWARD] + root + self._two_layers // 2 - self.gradients,
            peaks[_BACKWARD] + root + self._two_layers + self._reduced - self.gradients,
            peaks[_END] + root + self._first - self.gradients,
            end + root + self._outside - self.gradients,
        )

    def evaluate(self, batch: Batch) -> int:
        """Run an evaluation's pass; returns the peak besides weights and trained state."""
        self._begin_pass()
        self._model.eval()
        with torch.no_grad(), self._autocast():
            self._model.score(batch)
        self._model.train()
        self._enter(_END)
        return max(
            self._peaks[_BEFORE] + 2 * self.root,
            self._peaks[_FORWARD] + self.root + self._two_layers,
            self._peaks[_LOSS] + self.root + self._two_layers // 2,
        )


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _on_meta(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
