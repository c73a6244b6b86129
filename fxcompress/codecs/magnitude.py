"""magnitude: sign and magnitude, levels relative to the bucket's norm, stochastic. Unbiased.

"Mix-Precision Stochastic Quantization of Activations during Backpropagation" (thesis, Heidelberg,
2025), listing 5.1; the quantizer of QSGD (Alistarh et al., NeurIPS 2017, section 3.1). For a bucket
of consecutive elements and n levels:

    S  = max|x| (norm=max) or |x|_2 (norm=l2)
    a  = |x|/S,  i = floor(a*n),  q = (i + Bernoulli(a*n - i))/n,  x' = sign(x)*q*S

which are 2n + 1 values, so that "2 bits" (n = 4) take ceil(log2(9)) = 4. It is the uniform grid of
step S/n around 0 with zero = n (grid.py has the arithmetic); S/n is rounded up to `meta`, at least
2^-100. With

    |x|_2 = M * (sqrt(sum trunc(|x|/M * 2^15)^2) * 2^-15), M = max|x|

in fp32 the sum is of integers, so that its order changes no bit, and it cannot overflow. l2 is far
noisier than max: of 512 normal elements the largest is at a seventh of the norm, within the first
of four levels. A bucket with NaN or Inf, or whose S/n overflows, decodes to NaN, alone.

payload = codes (planar) | S/n meta[buckets]
bytes   = even(ceil(m/8)*bits) + 2*ceil(m/bucket), bits = ceil(log2(2n + 1)), bf16
error   = (S/n)^2 * f*(1-f), f = frac(a*n); bias 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import grid as grids
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import META, MIN_STEP, Grid
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import code_bytes, group_chunks
from fxcompress.codecs.sharing import Sharing, sharing
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton


@dataclass(frozen=True)
class Magnitude(Codec):
    """`levels` (1..127) of magnitude relative to the norm of a `bucket` (a multiple of 8)."""

    levels: int = 4
    bucket: int = 512
    norm: str = "max"
    meta: str = "bf16"

    name: ClassVar[str] = "magnitude"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise CodecError(f"{self}: levels must be 1..127, so that a code fits a byte")
        if self.bucket < 8 or self.bucket % 8:
            raise CodecError(f"{self}: bucket must be a multiple of 8, at least 8")
        grids.check_choice(self, "norm", ("max", "l2"))
        grids.check_choice(self, "meta", tuple(META))

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(shape))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if key is None or self.meta != "bf16":
            return False
        euclidean = self.norm == "l2"
        if triton.takes(x, self.bucket):
            from fxcompress.kernels.triton import magnitude as gpu

            parts = carve(payload, *self._sections(x.shape))
            triton.run(gpu.encode(x, parts, self.levels, euclidean, self.bucket, key, stream))
            return True
        if x.device.type != "cpu" or not cpu.available("magnitude"):
            return False
        keys = rng.stream_key_ints(key, stream)
        cpu.magnitude_encode(x, payload, self.levels, euclidean, self.bucket, *keys)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if self.meta != "bf16":
            return False
        if triton.takes(x, self.bucket):
            from fxcompress.kernels.triton import magnitude as gpu

            parts = carve(payload, *self._sections(x.shape))
            triton.run(gpu.decode(parts, x, self.levels, self.bucket))
            return True
        if x.device.type != "cpu" or not cpu.available("magnitude"):
            return False
        cpu.magnitude_decode(payload, x, self.levels, self.bucket)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        shared = self._sharing(x.shape)
        grid = self._grid(x.detach().reshape(-1), shared)
        return grids.stochastic_error(x, shared, grid, self.unbiased)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        flat, shared = x.view(-1), self._sharing(x.shape)
        codes, steps = carve(payload, *self._sections(x.shape))
        grid = self._grid(flat, shared)
        grids.encode(flat, codes, self.bucket, shared, grid, keys)
        steps.copy_(grids.narrow(grid.step, steps.dtype).view(-1))

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        codes, steps = carve(payload, *self._sections(x.shape))
        grid = Grid(steps.float()[None], 0.0, self.levels, 2 * self.levels)
        grids.decode(codes, x.view(-1), self.bucket, self._sharing(x.shape), grid)

    def _sharing(self, shape: Sequence[int]) -> Sharing:
        return sharing("group", shape, self.bucket)

    def _sections(self, shape: Sequence[int]) -> list[Section]:
        codes = code_bytes(math.prod(shape), (2 * self.levels).bit_length())
        return [(torch.uint8, codes), (META[self.meta], self._sharing(shape).count)]

    def _grid(self, x: Tensor, shared: Sharing) -> Grid:
        lowest, highest = grids.ends(x, shared)
        finite = lowest.isfinite() & highest.isfinite()
        largest = torch.maximum(lowest.abs(), highest.abs())
        exact = largest * (1.0 / self.levels)
        if self.norm == "l2":
            exact = exact * self._relative_norm(x, largest)
        step = grids.round_up(exact.clamp(min=MIN_STEP), META[self.meta])
        step = torch.where(finite & step.isfinite(), step, math.nan)
        return Grid(step, 0.0, self.levels, 2 * self.levels)

    def _relative_norm(self, x: Tensor, largest: Tensor) -> Tensor:
        """|x|_2 / max|x| of each bucket, fp32[1, buckets]; 1 where it is lost or all zeros."""
        found = [largest.new_empty(0)]
        for start, rows, size in group_chunks(x.numel(), self.bucket, x.device):
            values = x[start : start + rows * size].view(rows, size).float().abs()
            shares = values / largest[0, start // self.bucket :][:rows, None]
            squares = (shares * (1 << 15)).to(torch.int64).square_().sum(1)
            found.append(squares.float().sqrt() * 2.0**-15)
        ratio = torch.cat(found)[None]
        return torch.where((largest > 0) & largest.isfinite(), ratio, 1.0)
