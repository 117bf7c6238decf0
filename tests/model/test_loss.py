"""The loss and its gradient piece by piece, against PyTorch's over whole logits."""

from __future__ import annotations

import pytest
import rounding
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import nn

from cpm_bee.model import loss as loss_module
from cpm_bee.model.loss import OutputHead, TargetLoss, score


def whole(h: torch.Tensor, projection: OutputHead) -> torch.Tensor:
    logits = F.linear(h * projection.scale, projection.weight)
    return torch.cat([logits, F.linear(h, projection.table)], dim=-1)


@examples(40)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 20), st.integers(0, 9))
def test_pieces_make_the_whole(count: int, extension: int, piece: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"h": count, "weight": 30, "table": extension}
    inputs = nn.ParameterDict({n: torch.randn(s, 8, generator=generator) for n, s in sizes.items()})
    targets = torch.randint(0, 30 + extension, (count,), generator=generator)

    def projection_of(inputs: nn.ParameterDict) -> OutputHead:
        return OutputHead(inputs["weight"].detach(), 0.3, inputs["table"].detach())

    def by_pieces(inputs: nn.ParameterDict) -> dict[str, torch.Tensor]:
        projection = projection_of(inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "_PIECE", piece)
            scores = score(inputs["h"], projection, targets)
            total = TargetLoss.apply(inputs["h"], projection, targets)
            (gradient,) = torch.autograd.grad(3 * total, inputs["h"])
        logits = whole(inputs["h"], projection)
        assert scores.correct.tolist() == (logits.argmax(dim=-1) == targets).tolist()
        return {"losses": scores.losses, "total": total, "gradient": gradient}

    def plainly(inputs: nn.ParameterDict) -> dict[str, torch.Tensor]:
        logits = whole(inputs["h"], projection_of(inputs))
        losses = F.cross_entropy(logits, targets, reduction="none")
        (gradient,) = torch.autograd.grad(3 * losses.sum(), inputs["h"])
        return {"losses": losses, "total": losses.sum(), "gradient": gradient}

    rounding.assert_same(inputs, by_pieces, plainly)


@pytest.mark.parametrize("equal", [(3, 7), (7, 11), (10, 11)])
def test_of_equal_logits_the_first_is_the_answer(equal: tuple[int, int]) -> None:
    """As in 16 bit, where they are not rare; 10 entries are the vocabulary's."""
    rows = torch.zeros(12, 4)
    rows[list(equal)] = 1.0
    projection = OutputHead(rows[:10], 1.0, rows[10:])
    targets = torch.tensor([equal[0], equal[1]])
    assert score(torch.ones(2, 4), projection, targets).correct.tolist() == [True, False]
