"""Section 8: optimizer, schedules, loss scale."""

from __future__ import annotations

from typing import cast

import torch

from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.adamw import AdamW
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.network import CPMBee
from cpm_bee.train.schedules import STYLES, learning_rate
from format_examples.common import Json, Rows, example, number


@example
def schedules(page: Json) -> Rows:
    steps = [0, 1, 2, 4, 8, 12, 16]
    return [
        [style, *(number(learning_rate(style, 1.0, s, warmup=4, end=12)) for s in steps)]
        for style in STYLES
    ]


@example
def adamw_steps(page: Json) -> Rows:
    value = torch.tensor([1.0])
    optimizer = AdamW({"w": value}, weight_decay=0.1)
    rows = []
    for step, gradient in enumerate([0.5, 0.5, -1.0], start=1):
        optimizer.step({"w": value}, {"w": torch.tensor([gradient])}, lr=0.1)
        first, second, _ = optimizer.state["w"]
        cells = [gradient, float(first), float(second), float(value)]
        rows.append([str(step), *(f"{cell:.6f}" for cell in cells)])
    return rows


@example
def loss_scale(page: Json) -> Rows:
    model = torch.nn.Linear(1, 1, bias=False)
    engine = TorchEngine(torch.device("cpu"), torch.float16)
    settings = OptimizerSettings(
        weight_decay=0.0, clip_grad=1.0, loss_scale=1024, loss_scale_factor=2, loss_scale_steps=2
    )
    engine.prepare(cast(CPMBee, model), settings)
    rows = []
    for step, gradient in enumerate([1.0, 1.0, float("inf"), 1.0, 1.0], start=1):
        before = engine.loss_scale
        with torch.autocast("cpu", enabled=False):
            engine.backward((model.weight * gradient).sum())
        skipped = engine.step(0.1).skipped
        cells = ["overflow" if skipped else "finite", "skipped" if skipped else "done"]
        rows.append([str(step), f"{before:g}", *cells, f"{engine.loss_scale:g}"])
    return rows
