import math

import torch
from torch import nn

from cpm_bee.engine.finite import not_finite


def test_names_of_broken_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not_finite(model, only_frozen=False) == []
    with torch.no_grad():
        model[0].weight[0, 1] = math.nan
        model[0].bias[0] = -math.inf
        model[1].running_mean[0] = math.inf
    model[0].bias.requires_grad_(False)
    assert not_finite(model, only_frozen=False) == ["0.weight", "0.bias", "1.running_mean"]
    assert not_finite(model, only_frozen=True) == ["0.bias", "1.running_mean"]
