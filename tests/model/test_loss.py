"""The loss and its gradient piece by piece, against PyTorch's over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_bee.model import loss as loss_module
from cpm_bee.model.loss import OutputHead, TargetLoss, score


def whole(h: torch.Tensor, projection: OutputHead) -> torch.Tensor:
    logits = F.linear(h * projection.scale, projection.weight)
    return torch.cat([logits, F.linear(h, projection.table)], dim=-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 20), st.integers(0, 9))
def test_pieces_make_the_whole(count: int, extension: int, piece: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(count, 8, generator=generator, requires_grad=True)
    weight, table = (torch.randn(n, 8, generator=generator) for n in (30, extension))
    projection = OutputHead(weight, 0.3, table)
    targets = torch.randint(0, 30 + extension, (count,), generator=generator)
    logits = whole(h, projection)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(3 * expected.sum(), h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_PIECE", piece)
        scores = score(h, projection, targets)
        total = TargetLoss.apply(h, projection, targets)
        (ours,) = torch.autograd.grad(3 * total, h)
    torch.testing.assert_close(scores.losses, expected.detach(), rtol=1e-5, atol=1e-5)
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
    assert scores.correct.tolist() == (logits.argmax(dim=-1) == targets).tolist()


@pytest.mark.parametrize("equal", [(3, 7), (7, 11), (10, 11)])
def test_of_equal_logits_the_first_is_the_answer(equal: tuple[int, int]) -> None:
    """As in 16 bit, where they are not rare; 10 entries are the vocabulary's."""
    rows = torch.zeros(12, 4)
    rows[list(equal)] = 1.0
    projection = OutputHead(rows[:10], 1.0, rows[10:])
    targets = torch.tensor([equal[0], equal[1]])
    assert score(torch.ones(2, 4), projection, targets).correct.tolist() == [True, False]
