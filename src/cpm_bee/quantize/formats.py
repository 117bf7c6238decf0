"""Formats of weights in 4 and 8 bit: quantization to codes and scales, and dequantization.

NF4 is the data type of QLoRA (Dettmers et al., 2023, section 3) without double quantization, with
the same bytes as in bitsandbytes: blocks of 64 values of a row, the first value of a pair in the
high half of its byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from cpm_bee.errors import InputError
from cpm_bee.quantize import kernels

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64

# The number of values per chunk on a CPU: temporaries stay in the cache, and below the size above
# which malloc gets new pages from the kernel each time (which takes longer than the arithmetic).
_CHUNK = 1 << 19
_LEAST = 1e-38  # replaces the absmax of a block of zeros; its inverse is finite


class Format(ABC):
    """A format that stores a matrix W [dim_out, dim_in] as `codes` and `absmax`."""

    name: str
    codes_dtype: torch.dtype

    @abstractmethod
    def sizes(self, dim_out: int, dim_in: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of codes and of absmax (fp32).

        Raises:
            InputError: the format does not support a matrix of this size.
        """

    @abstractmethod
    def _encode(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and absmax of rows in fp32 on the CPU; w is not changed."""

    @abstractmethod
    def _decode(self, codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [rows, dim_in], fp32 and contiguous."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and absmax of a matrix in any floating-point dtype, on the CPU.

        Raises:
            InputError: the matrix has values that are not finite.
        """
        dim_out, dim_in = weight.shape
        codes_size, absmax_size = self.sizes(dim_out, dim_in)
        codes = torch.empty(codes_size, dtype=self.codes_dtype)
        absmax = torch.empty(absmax_size)
        for rows in row_chunks(dim_out, dim_in, _CHUNK):
            codes[rows], absmax[rows] = self._encode(weight[rows].float().contiguous())
        if not torch.isfinite(absmax).all():
            raise InputError("has values that are not finite")
        return codes, absmax

    def dense(self, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize: returns the matrix [dim_out, dim_in] in a dtype."""
        dim_out, dim_in = len(codes), self.dim_in(codes)
        out = torch.empty(dim_out, dim_in, dtype=dtype, device=codes.device)
        chunk = _CHUNK if codes.device.type == "cpu" else out.numel()
        for rows in row_chunks(dim_out, dim_in, chunk):
            part = out[rows]
            wide = part if dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            self._decode(codes[rows], absmax[rows], wide)
            if wide is not part:
                part.copy_(wide)
        return out

    @abstractmethod
    def dim_in(self, codes: torch.Tensor) -> int:
        """The number of columns of the matrix, given its codes."""


def row_chunks(rows: int, columns: int, values: int) -> Iterator[slice]:
    """Yields slices of rows with about `values` values each."""
    step = max(1, values // max(1, columns))
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))


class NF4(Format):
    """codes uint8 [dim_out, dim_in/2], absmax [dim_out, dim_in/64]: W = value(code) * absmax."""

    name = "nf4"
    codes_dtype = torch.uint8

    def sizes(self, dim_out: int, dim_in: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if dim_in % BLOCK:
            raise InputError(
                f"has {dim_in} columns; nf4 needs a multiple of {BLOCK} (int8 takes any number)"
            )
        return (dim_out, dim_in // 2), (dim_out, dim_in // BLOCK)

    def dim_in(self, codes: torch.Tensor) -> int:
        return 2 * codes.shape[1]

    def _encode(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = w.view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1)
        # Times the inverse, like bitsandbytes: a division would round differently.
        scaled = (blocks * (1 / absmax.clamp(min=_LEAST))[:, None]).clamp_(-1, 1)
        # Counting the bounds below a value takes a tenth of the time of torch.bucketize, and
        # NumPy's comparison a quarter of the time of torch's.
        code = np.zeros(scaled.shape, dtype=np.uint8)
        above = np.empty(scaled.shape, dtype=bool)
        for bound in _nf4_bounds():
            np.greater(scaled.numpy(), bound, out=above)
            code += above.view(np.uint8)
        flat = torch.from_numpy(code).view(-1)
        return ((flat[::2] << 4) | flat[1::2]).view(len(w), -1), absmax.view(len(w), -1)

    def _decode(self, codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        # A byte encodes two values, which are looked up together as one item of 8 bytes.
        value = torch.tensor(NF4_VALUES, device=codes.device)
        pairs = torch.stack([value.repeat_interleave(16), value.repeat(16)], dim=1)  # (256, 2)
        torch.index_select(
            pairs.view(torch.int64).view(-1),
            0,
            codes.reshape(-1).long(),
            out=out.view(torch.int64).view(-1),
        )
        out.view(*absmax.shape, BLOCK).mul_(absmax[:, :, None])

    def dense(self, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if codes.device.type == "cuda" and kernels.available(codes.device, dtype):
            return kernels.dequantize(codes, absmax, dtype)
        return super().dense(codes, absmax, dtype)


def _nf4_bounds() -> np.ndarray:
    """The midpoints between neighbouring values, rounded like bitsandbytes: [15], fp32."""
    values = np.asarray(NF4_VALUES, dtype=np.float32)
    return (values[:-1] + values[1:]) / np.float32(2)


class Int8(Format):
    """codes int8 [dim_out, dim_in], absmax [dim_out, 1]: W = code * absmax/127."""

    name = "int8"
    codes_dtype = torch.int8

    def sizes(self, dim_out: int, dim_in: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (dim_out, dim_in), (dim_out, 1)

    def dim_in(self, codes: torch.Tensor) -> int:
        return codes.shape[1]

    def _encode(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = w.abs().amax(dim=1, keepdim=True)
        return (w * (127 / absmax.clamp(min=_LEAST))).round_().to(torch.int8), absmax

    def _decode(self, codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(codes, absmax / 127, out=out)


FORMATS: dict[str, Format] = {f.name: f for f in (NF4(), Int8())}
