"""Codes and scales: against their definition, and byte for byte against bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.errors import InputError
from cpm_bee.quantize import CHOICES, NONE, kernels
from cpm_bee.quantize.formats import _CHUNK, BLOCK, FORMATS, NF4_VALUES, row_chunks

NF4, INT8 = FORMATS["nf4"], FORMATS["int8"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Several pieces, the last one shorter.
LARGE = (_CHUNK // 512 * 2 + 3, 512)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: NF4 is NOT compared with it (pip install -e '.[dev]')",
)


def matrix(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_all_formats_can_be_chosen() -> None:
    assert (NONE, *FORMATS) == CHOICES


@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_is_the_nearest_value_of_a_block(dtype: torch.dtype) -> None:
    w = matrix(6, 192, dtype=dtype)
    w[0, :BLOCK] = 0
    w[1, 5] = 100
    codes, absmax = NF4.quantize(w)
    assert (codes.dtype, codes.shape) == (torch.uint8, (6, 96))
    assert (absmax.dtype, absmax.shape) == (torch.float32, (6, 3))
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    for row in range(6):
        for column in range(192):
            byte = int(codes[row, column // 2])
            code = byte >> 4 if column % 2 == 0 else byte & 15
            largest = w[row, column // BLOCK * BLOCK :][:BLOCK].abs().max().double()
            assert absmax[row, column // BLOCK] == largest
            if largest == 0:
                assert values[code] == 0
                continue
            distance = (values - w[row, column].double() / largest).abs()
            # In fp32 a value in the middle between two may fall to either side.
            assert distance[code] <= distance.min() + 1e-6


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
@examples(30)
def test_a_quantized_matrix_stays_as_it_is(seed: int, scale: float) -> None:
    w = matrix(4, 128, seed=seed) * scale
    for format in FORMATS.values():
        once = format.quantize(w)
        again = format.quantize(format.dense(*once, torch.float32))
        assert torch.equal(once[0], again[0])
        torch.testing.assert_close(once[1], again[1], rtol=1e-6, atol=0)


def test_int8_is_the_nearest_of_255_steps_of_a_row() -> None:
    w = matrix(7, 50)
    w[3] = 0
    codes, absmax = INT8.quantize(w)
    assert (codes.dtype, absmax.shape) == (torch.int8, (7, 1))
    assert torch.equal(absmax, w.abs().amax(1, keepdim=True))
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((INT8.dense(codes, absmax, torch.float32) - w).abs() <= step * 0.5001).all()
    assert int(codes.abs().max()) == 127


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_are_put_together(format, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    w = matrix(*LARGE, dtype=dtype)
    codes, absmax = format.quantize(w)
    dense = format.dense(codes, absmax, dtype)
    assert (dense.shape, dense.dtype) == (w.shape, dtype)
    for row in (0, LARGE[0] // 2, LARGE[0] - 1):
        one = slice(row, row + 1)
        assert torch.equal(format.quantize(w[one])[0], codes[one])
        assert torch.equal(format.dense(codes[one], absmax[one], dtype), dense[one])
    assert not w.isnan().any()


def test_slices_of_rows() -> None:
    assert list(row_chunks(5, 10, 20)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(row_chunks(2, 100, 20)) == [slice(0, 1), slice(1, 2)]


def test_sizes_that_nf4_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"100 columns.*64"):
        NF4.quantize(matrix(2, 100))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(format, bad: float) -> None:  # type: ignore[no-untyped-def]
    w = matrix(4, 64)
    w[2, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        format.quantize(w)


# ------------------------------------------------------------------ bitsandbytes


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "size, scale", [((64, 256), 1.0), ((33, 64), 1e-4), (LARGE, 30.0), ((1280, 1024), 0.02)]
)
def test_bytes_of_bitsandbytes(dtype: torch.dtype, size: tuple[int, int], scale: float) -> None:
    from bitsandbytes import functional

    w = (matrix(*size, seed=5) * scale).to(dtype)
    w[1, :BLOCK] = 0
    w[2, :BLOCK] = torch.linspace(-1, 1, BLOCK)  # many values near the bounds
    theirs, state = functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    codes, absmax = NF4.quantize(w)
    assert torch.equal(codes.view(-1), theirs.view(-1))
    assert torch.equal(absmax.view(-1), state.absmax.view(-1))
    for wanted in FLOATS:
        state.dtype = wanted
        dense = functional.dequantize_4bit(theirs, state)
        assert torch.equal(NF4.dense(codes, absmax, wanted), dense)


@needs_bitsandbytes
def test_bounds_of_bitsandbytes() -> None:
    # Every bound itself, and its neighbours among the fp32 numbers.
    from bitsandbytes import functional

    values = torch.tensor(NF4_VALUES)
    bounds = (values[1:] + values[:-1]) / 2
    infinity = torch.full_like(bounds, float("inf"))
    near = torch.cat([bounds, bounds.nextafter(infinity), bounds.nextafter(-infinity), values])
    w = torch.cat([near, torch.ones(3)]).view(1, BLOCK)
    theirs, _ = functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(NF4.quantize(w)[0].view(-1), theirs.view(-1))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", FLOATS)
def test_its_kernels_take_our_bytes(dtype: torch.dtype) -> None:
    # Its CUDA kernels have this API and layout; here those for a CPU answer.
    w = matrix(96, 128)
    codes, absmax = NF4.quantize(w)
    dense = NF4.dense(codes, absmax, dtype)
    assert torch.equal(kernels.dequantize(codes, absmax, dtype), dense)
    x = matrix(3, 128, seed=1, dtype=dtype)
    product = kernels.product(x, codes, absmax)
    assert product.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(product, x @ dense.T, rtol=tolerance, atol=tolerance * 8)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_work_are_used(dtype: torch.dtype) -> None:
    kernels.available.cache_clear()
    assert kernels.available(torch.device("cpu"), dtype)


class _Broken:
    """bitsandbytes as it is where it does not work: it fails, or computes something else."""

    def __init__(self, factor: float | None) -> None:
        self.calls = 0
        self._factor = factor

    def QuantState(self, **values: Any) -> dict[str, Any]:
        return values

    def dequantize_4bit(self, codes: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        self.calls += 1
        if self._factor is None:
            raise RuntimeError("no kernel image is available\nfor this device")
        absmax = state["absmax"].view(len(codes) // 64, -1)
        return NF4.dense(codes.view(len(absmax), -1), absmax, state["dtype"])

    def matmul_4bit(self, x: torch.Tensor, codes: torch.Tensor, quant_state: Any) -> torch.Tensor:
        assert self._factor is not None
        return self._factor * x @ self.dequantize_4bit(codes, quant_state).mT


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(None, "no kernel image is available"), (0.5, "wrong results"), (1.0, None)],
)
def test_kernels_that_do_not_work_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    factor: float | None,
    reason: str | None,
) -> None:
    broken = _Broken(factor)
    monkeypatch.setattr(kernels, "_module", lambda name: broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    kernels.available.cache_clear()
    with caplog.at_level("WARNING", logger="cpm_bee"):
        usable = [kernels.available(torch.device("cpu"), torch.float32) for _ in range(3)]
    kernels.available.cache_clear()
    assert usable == [reason is None] * 3
    assert [f"({reason})" in message for message in caplog.messages] == [True] * (
        reason is not None
    )
    assert broken.calls == (1 if factor is None else 3)  # tried once
