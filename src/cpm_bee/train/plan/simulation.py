"""The tensors that a run holds at the worst moment of each of its phases.

The run is the real one on tensors without values: `CPMBee.score` and `CPMBee.loss`, the backward
pass, clipping, AdamW, and the copies of what is saved, in the order of `Trainer`. On a CPU it
includes the storages that `buffer_pool` keeps: those that an evaluation has made stay for the rest
of the run, beside those of the training steps.

Attention blocks between the first and the last layer take the same memory each, and so do
feed-forward blocks. So a deep model is simulated with few layers, and the peak of each phase is
continued linearly in both numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cpm_bee.data.batch import Batch
from cpm_bee.engine.adamw import AdamW
from cpm_bee.engine.clip import clip_by_global_norm
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.frozen.buffers import buffer_pool
from cpm_bee.model.layers import Linear
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.linear import QuantizedLinear
from cpm_bee.train.live_storages import LiveStorages
from cpm_bee.train.memory_estimate import TrainingSetup, meta_model, set_parameters

EVALUATION, SAVING, STEP = "evaluation", "saving", "training step"
_WHOLE = 12  # layers of a model that is simulated as it is


@dataclass(frozen=True)
class Workload:
    """What a run computes, as far as it determines memory.

    Attributes:
        steps: the micro-batches of some training steps, in their order.
        evaluation: batches of the evaluation set; empty without one.
    """

    steps: Sequence[Sequence[Batch]]
    evaluation: Sequence[Batch] = ()


@dataclass(frozen=True)
class Peaks:
    """Numbers of bytes. `phases` has the most that is held in each phase, all included."""

    weights: int
    gradients: int
    moments: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def rest(self) -> int:
        """Activations, logits, buffers and copies at the peak."""
        return self.peak - self.weights - self.gradients - self.moments


def simulate(
    config: ModelConfig, training: TrainingSetup, work: Workload, *, on_gpu: bool = False
) -> Peaks:
    """Simulate a run of one process that holds the whole model.

    Args:
        on_gpu: count what is on the GPU. Its allocator keeps no storages as `buffer_pool` does,
            weights are dequantized whole, and what is saved is copied to the host.
    """
    if config.num_layers <= _WHOLE:
        return _simulate(config, training, work, on_gpu)
    # A whole layer below and one above, and between them nothing, attention, or feed-forward.
    middles = ((), ((False, True),), ((True, False),))
    base, attention, feed_forward = (
        _simulate(_stack(config, middle), training, work, on_gpu) for middle in middles
    )
    layers = range(config.num_layers)
    attentions = sum(map(config.has_attention, layers)) - 2
    feed_forwards = sum(map(config.has_ffn, layers)) - 2

    def at_depth(of: Callable[[Peaks], int]) -> int:
        least = of(base)
        more = attentions * (of(attention) - least) + feed_forwards * (of(feed_forward) - least)
        return least + more

    return Peaks(
        at_depth(lambda p: p.weights),
        at_depth(lambda p: p.gradients),
        at_depth(lambda p: p.moments),
        {name: at_depth(lambda p, name=name: p.phases[name]) for name in base.phases},  # type: ignore[misc]
    )


def _stack(config: ModelConfig, middle: tuple[tuple[bool, bool], ...]) -> ModelConfig:
    masks = ((False, False), *middle, (False, False))
    return replace(config, num_layers=len(masks), mask_modules=masks)


def _simulate(config: ModelConfig, training: TrainingSetup, work: Workload, on_gpu: bool) -> Peaks:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        with fake:
            return torch.empty(shape, dtype=dtype, device="cpu")

    model = meta_model(config, training)
    if on_gpu:
        _dequantize_whole(model)
    with LiveStorages(fake) as live, simulated_pool(on_gpu):
        set_parameters(model, training, make)
        run = _Run(model, training, live, config.half, on_gpu)
        if work.evaluation:
            run.evaluate(work.evaluation)
        run.save()
        for step in work.steps:
            run.train(step)
        if work.evaluation:
            run.evaluate(work.evaluation)
        run.save()
        return Peaks(run.weights, run.gradients, run.moments, run.phases)


def simulated_pool(on_gpu: bool) -> AbstractContextManager[None]:
    """`buffer_pool` without values, inside `LiveStorages`; a GPU's allocator needs none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def storage(nbytes: int) -> torch.UntypedStorage:
        return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()

    if on_gpu:
        return contextlib.nullcontext()
    # The keys of the cache refer to storages.
    return buffer_pool.simulated(storage, FakeTensorMode.cache_clear)


class _Run:
    """A run of `Trainer` on tensors without values."""

    def __init__(
        self, model: CPMBee, training: TrainingSetup, live: LiveStorages, half: bool, on_gpu: bool
    ) -> None:
        self._model, self._training, self._live = model, training, live
        self._half = half and training.delta is None
        self._on_gpu = on_gpu
        self.weights = live.live
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = AdamW(self._trained, weight_decay=0.01)
        self.moments = live.live - self.weights
        self.gradients = sum(p.nbytes for p in self._trained.values())
        self.phases: dict[str, int] = {}

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._live.peak = self._live.live
        yield
        self.phases[name] = max(self.phases.get(name, 0), self._live.peak)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._training.dtype
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def evaluate(self, batches: Sequence[Batch]) -> None:
        self._model.eval()
        with self._phase(EVALUATION):
            for batch in batches:
                with self._autocast():
                    self._model.score(batch)
        self._model.train()

    def save(self) -> None:
        """The copies that `Engine.trained_tensors` and `Engine.training_state` return."""
        if self._on_gpu:
            return
        with self._phase(SAVING), torch.no_grad():
            tensors = [p.detach().clone() for p in self._trained.values()]
            halves = [t.half() for t in tensors] if self._half else []
            del halves
            del tensors
            state = [p.detach().clone() for p in self._trained.values()]
            for first, second, _ in self._optimizer.state.values():
                state += [first.clone(), second.clone()]
            del state

    def train(self, batches: Sequence[Batch]) -> None:
        with self._phase(STEP):
            targets = sum(batch.num_targets for batch in batches)
            for number, batch in enumerate(batches):
                with self._autocast():
                    loss = self._model.loss(batch) / targets
                if number == 0:  # those of the last step, which the engine keeps until now
                    for p in self._trained.values():
                        p.grad = None
                loss.backward()
                del loss
            found = {n: p.grad for n, p in self._trained.items() if p.grad is not None}
            clip_by_global_norm(list(found.values()), 1.0)
            self._optimizer.step(self._trained, found, 1e-3)


def _dequantize_whole(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.pieces = functools.partial(Linear.pieces, layer)  # type: ignore[method-assign]
