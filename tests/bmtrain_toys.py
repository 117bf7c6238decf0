"""Toy models that show how bmtrain and the engine behave; a script for each process.

    python tests/bmtrain_toys.py FOLDER

writes the result of each scene in this process to the folder (see `bmtrain_cpu.run_ranks`).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import bmtrain_cpu
import tiny
import torch
from torch import nn

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.bmtrain_sharding import _gathered_once

SETTINGS = OptimizerSettings(
    weight_decay=0.0, clip_grad=1e9, loss_scale=8.0, loss_scale_factor=2.0, loss_scale_steps=100
)
WORLD = 2


class Layer(nn.Module):
    """Computes h + w * h, and records whether autocast is on."""

    def __init__(self, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad)
        self.autocast: list[bool] = []

    def forward(self, h: torch.Tensor, more: Any = None) -> torch.Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return h + self.weight * h + (0 if more is None else more())


class Stack(nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h)
        return h.sum()


def inputs(rank: int) -> torch.Tensor:
    return torch.arange(6.0) + 1 + 10 * rank


def true_gradients(*layers: Layer) -> list[torch.Tensor | None]:
    """Returns the gradients summed over the ranks' inputs, by plain PyTorch."""
    stack = Stack(*layers)
    for rank in range(WORLD):
        stack(inputs(rank)).backward()
    return [layer.weight.grad for layer in layers]


def whole(bmt: Any, part: Any, values: Any) -> torch.Tensor:
    """Returns a tensor from the ranks' parts."""
    result = torch.zeros(part._original_shape.numel())
    if part.numel():
        result[part._start_partition : part._end_partition] = values.float()
    return bmt.distributed.all_reduce(result, "sum")


def unfrozen_later(bmt: Any, make: Any) -> Any:
    frozen = Layer(requires_grad=False)
    model = bmt.BMTrainModelWrapper(Stack(frozen, Layer()))
    frozen.weight.requires_grad_(True)
    model(inputs(bmt.rank())).backward()
    return frozen.weight.grad


def list_with_a_frozen_begin(bmt: Any, make: Any) -> Any:
    found = {}
    for kind in ("ModuleList", "TransformerBlockList"):
        layers = [Layer(requires_grad=False), Layer(), Layer()]
        if kind == "ModuleList":
            run = bmt.BMTrainModelWrapper(Stack(*layers))
        else:
            blocks = bmt.TransformerBlockList(
                [bmt.Block(bmt.BMTrainModelWrapper(layer)) for layer in layers]
            )

            def run(h: torch.Tensor, blocks: Any = blocks) -> torch.Tensor:
                return blocks(h).sum()

        run(inputs(bmt.rank())).backward()
        found[kind] = [x.weight.grad for x in layers[1:]]  # all of it is on the first rank
    return found


def decay(bmt: Any, make: Any) -> Any:
    found = {}
    for dtype in (torch.float32, torch.float16):
        part = bmt.DistributedParameter(torch.full((6,), 4.0, dtype=dtype))
        optimizer = bmt.optim.AdamOffloadOptimizer([part], lr=0.1, weight_decay=0.5)
        part.grad = torch.zeros_like(part)
        optimizer.step()
        found[dtype] = whole(bmt, part, part.detach())
    return found


def gradients_set_to_none(bmt: Any, make: Any) -> Any:
    found = []
    for way in ("none", "zero"):
        layer = Layer()
        model = bmt.BMTrainModelWrapper(Stack(layer))
        optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters())
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(optimizer)
        for _ in range(2):
            if way == "none":
                optimizer.zero_grad(set_to_none=True)
            else:
                manager.zero_grad()
            model(inputs(bmt.rank())).backward()
        found.append(whole(bmt, layer.weight, layer.weight.grad))
    engine = make(torch.float32)
    model, batch = prepared(engine)
    norms = []
    for _ in range(2):
        engine.backward(model.loss(batch))
        norms.append(engine.step(0.0).grad_norm)
    return found, norms


def averaged_or_summed(bmt: Any, make: Any) -> Any:
    found = []
    for arguments in ({}, {"grad_scale": 1}):
        layer = Layer()
        model = bmt.BMTrainModelWrapper(Stack(layer))
        manager = bmt.optim.OptimManager(**arguments)
        manager.add_optimizer(bmt.optim.AdamOffloadOptimizer(model.parameters()))
        manager.backward(model(inputs(bmt.rank())))
        found.append(whole(bmt, layer.weight, layer.weight.grad))
    engine = make(torch.float32)
    model, batch = prepared(engine)
    engine.backward(model.loss(batch))
    return found, engine.step(0.0).grad_norm


def overflow(bmt: Any, make: Any) -> Any:
    found = {}
    for dtype, scale in (
        (torch.float16, 8.0),
        (torch.float32, 8.0),
        (torch.float16, None),
    ):
        part = bmt.DistributedParameter(torch.ones(6, dtype=dtype))
        manager = bmt.optim.OptimManager(loss_scale=scale)
        manager.add_optimizer(bmt.optim.AdamOffloadOptimizer([part]))
        part.grad = torch.full_like(part, float("inf"))
        manager.step()
        values = whole(bmt, part, part.detach())
        found[dtype, scale] = (values, manager.loss_scale)
    return found


def parts(bmt: Any, make: Any) -> Any:
    engine = make(torch.float32)
    model, _ = prepared(engine)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, engine.trained_tensors()


def first_rate(bmt: Any, make: Any) -> Any:
    schedule = bmt.lr_scheduler.Noam(
        bmt.optim.AdamOffloadOptimizer([bmt.DistributedParameter(torch.ones(6))]), 0.1, 5, -1
    )
    engine = make(torch.float32)
    model, batch = prepared(engine)
    before = engine.trained_tensors()
    engine.backward(model.loss(batch))
    engine.step(0.01)
    after = engine.trained_tensors()
    moved = max(
        ((after[n] - before[n]).abs().max().item() for n in after if len(after[n])), default=0
    )
    return schedule.current_lr, moved


class Joined(nn.Module):
    """A weight behind another tensor, so that its gradient is the end of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self) -> torch.Tensor:
        before = torch.zeros(3, requires_grad=True)
        return (torch.cat([before, self.weight]) * (torch.arange(9.0) + 1)).sum()


def view_as_gradient(bmt: Any, make: Any) -> Any:
    found = []
    for once_a_pass in (False, True):
        joined = Joined()
        model = bmt.BMTrainModelWrapper(joined)
        with _gathered_once(model)() if once_a_pass else contextlib.nullcontext():
            loss = model()
        loss.backward()
        part = joined._parameters["weight"]
        assert part is not None
        found.append(whole(bmt, part, part.grad))
    return found


def gradient_around_the_arguments(bmt: Any, make: Any) -> Any:
    found: list[Any] = []
    for use_checkpoint in (True, False):
        blocks = [
            bmt.Block(bmt.BMTrainModelWrapper(Layer()), use_checkpoint=use_checkpoint)
            for _ in range(2)
        ]
        leaf = torch.ones(6, requires_grad=True)
        more = leaf.exp()  # keeps its result for the backward pass, as the bias does
        h = inputs(bmt.rank()).requires_grad_()
        for block in blocks:
            h = block(h, lambda more=more: more)
        try:
            h.sum().backward()
            found.append(leaf.grad)
        except RuntimeError as error:
            found.append(str(error))
    return found


def autocast_of_the_first_layer(bmt: Any, make: Any) -> Any:
    layer = Layer()
    block = bmt.Block(bmt.BMTrainModelWrapper(layer), use_checkpoint=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(inputs(bmt.rank())).sum()
    out.backward()
    engine = make(torch.bfloat16)
    model, batch = prepared(engine, delta_on=("project_q",))
    seen: list[bool] = []
    first = model.encoder.layers[0]._module
    first.self_att.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    first.self_att.dropout.p = 0.1  # so that the layer is computed by PyTorch's own gradients
    with engine.autocast():
        loss = model.loss(batch)
    engine.backward(loss)
    return layer.autocast, seen


def whole_while_it_computes(bmt: Any, make: Any) -> Any:
    engine = make(torch.float32)
    model, batch = prepared(engine)
    layers = [block._module for block in model.encoder.layers]
    seen: list[list[bool]] = []

    def note(*_: Any) -> None:
        seen.append([layer.self_att.self_attention.project_q.weight.dim() == 2 for layer in layers])

    for layer in layers:
        layer.ffn.register_forward_pre_hook(note)
        layer.ffn.register_full_backward_hook(note)
    engine.backward(model.loss(batch))
    note()
    return seen, [p.dim() for p in model.parameters()]


def batch_of(rank: int) -> Any:
    return collate(tiny.encode([{"input": "春 a" * (rank + 1), "<ans>": "b"}]), tiny.TOKENIZER)


def prepared(engine: Any, delta_on: tuple[str, ...] | None = None) -> tuple[Any, Any]:
    model = tiny.make_model(3, num_layers=2)
    if delta_on is not None:
        delta.insert(model, delta.DeltaConfig(rank=2, targets=delta_on), seed=0)
    engine.prepare(model.train(), SETTINGS)
    return model, batch_of(engine.rank)


SCENES = (
    unfrozen_later, list_with_a_frozen_begin, decay, gradients_set_to_none, averaged_or_summed,
    overflow, parts, first_rate, view_as_gradient, gradient_around_the_arguments,
    autocast_of_the_first_layer, whole_while_it_computes,
)  # fmt: skip


def main(folder: Path) -> None:
    bmt, make = bmtrain_cpu.engines()
    make(torch.float32)
    found = {scene.__name__: scene(bmt, make) for scene in SCENES}
    torch.save(found, folder / f"rank-{bmt.rank()}.pt")
    bmt.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
