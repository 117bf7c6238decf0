from __future__ import annotations

import math

import pytest
import tiny
import torch

from cpm_bee.model.layers import Embedding, Linear, RMSNorm


def test_linear_divides_by_the_root_of_its_input() -> None:
    linear = Linear(16, 3)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(5, 16)
    torch.testing.assert_close(linear(x), x @ linear.weight.T / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_computes_in_fp32(dtype: torch.dtype) -> None:
    norm = RMSNorm(4, eps=1e-6).to(dtype)
    torch.nn.init.ones_(norm.weight)
    x = torch.tensor([[300.0, -400.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0]], dtype=dtype)
    y = norm(x)  # 400² is beyond fp16
    assert y.dtype == dtype
    first = torch.tensor([1.2, -1.6, 0, 0])
    second = torch.tensor([1e-3 / math.sqrt(1e-6 / 4 + 1e-6), 0, 0, 0])
    torch.testing.assert_close(y.float(), torch.stack([first, second]), rtol=1e-2, atol=0)


def make_embedding() -> Embedding:
    embedding = Embedding(tiny.make_config())
    torch.nn.init.normal_(embedding.weight)
    return embedding


def test_sub_zero_changes_nothing_and_subs_keep_the_length() -> None:
    embedding = make_embedding()
    ids = torch.tensor([3, 3, 3, 5])
    e = embedding(ids, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(e[[0, 3]], embedding.weight[[3, 5]] / math.sqrt(12))
    torch.testing.assert_close(e[:3].norm(dim=1), e[0].norm().expand(3))
    assert not torch.allclose(e[0], e[1]) and not torch.allclose(e[1], e[2])


def test_the_first_pair_is_turned_by_sixteen_radians_a_sub() -> None:
    embedding = make_embedding()
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[3, 0] = math.sqrt(12)
    e = embedding(torch.tensor([3]), torch.tensor([2]))[0]
    assert e[0].item() == pytest.approx(math.cos(32), abs=1e-5)
    assert e[6].item() == pytest.approx(math.sin(32), abs=1e-5)
    embedding.distance_scale = 5  # another one of a Hugging Face config
    e = embedding(torch.tensor([3]), torch.tensor([2]))[0]
    assert e[0].item() == pytest.approx(math.cos(10), abs=1e-5)
    assert Embedding(tiny.make_config(distance_scale=5)).distance_scale == 5


def test_few_and_many_rows_of_logits_are_the_same() -> None:
    """Up to eight rows take another way through the matrix."""
    embedding = make_embedding()
    h = torch.randn(9, 12)
    extension = torch.tensor([1, 2]), torch.tensor([1, 4])
    whole = embedding.logits(h, *extension)
    assert whole.shape == (9, len(tiny.TOKENIZER) + 2)
    torch.testing.assert_close(whole[:, : len(tiny.TOKENIZER)], h @ embedding.weight.T / 12**0.5)
    torch.testing.assert_close(whole[:, len(tiny.TOKENIZER) :], h @ embedding(*extension).T)
    parts = [embedding.logits(part, *extension) for part in (h[:1], h[1:9])]
    torch.testing.assert_close(torch.cat(parts), whole)
    nothing = torch.empty(0, dtype=torch.int64)
    none = embedding.logits(h, nothing, nothing)
    torch.testing.assert_close(none, whole[:, : len(tiny.TOKENIZER)])
    assert embedding.logits(h[:0], *extension).shape == (0, len(tiny.TOKENIZER) + 2)
