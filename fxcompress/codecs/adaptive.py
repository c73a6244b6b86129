"""adaptive: bits for each sample, so that samples of wide range get more. Unbiased.

ActNN's allocation to samples (Chen et al., ICML 2021, arXiv 2104.14129). Each sample (axis 0; a
vector is one) is a row of consecutive groups, its last one shorter. With integers, so that no order
of summing matters:

    C_n = sum over groups of trunc(2^20 * range / largest range of the tensor)^2
    minimise sum_n C_n / (2^b_n - 1)^2 under sum_n b_n = floor(bits*N), b_n = 1..8

(bits to four decimals). All samples start at 8 bits and the cheapest bit goes, one at a time; what
a sample's bits cost rises as they go, so that these are the smallest of all costs, and one sort
finds them on the device, where ActNN's heap waits for the host. Products are fp64; of equal costs
the higher bit goes first, then the higher sample, so that samples that are alike end alike (ActNN
empties one after the other). A group of no finite range counts 0. The codes of a sample are those
of uniform.py with top = 2^b_n - 1. A group with NaN or Inf decodes to NaN. ActNN pads samples with
zeros to whole groups and rounds metadata after drawing; we do neither.

The bits of a sample are b_n planes of one bit each, lowest first, planar over the sample: as many
planes as bits there are, whoever has them, so that the payload's size does not depend on x.

payload = step bf16[N*G] | lo bf16[N*G] | b uint8[N] | planes, samples in order
bytes   = 4*N*G + N + floor(bits*N)*ceil(P/8), P elements a sample, G = ceil(P/group)
error   = step^2 * f*(1-f), f = frac((x - lo)/step), with the bits that this x gets; bias 0
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import blocks, uniform
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import narrow
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import code_bytes, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import triton

_BF16 = torch.bfloat16
_MOST = 8
# What a sample loses with its 8th, 7th, ... 2nd bit, in units of C.
_COSTS = tuple((2.0 ** (b - 1) - 1) ** -2 - (2.0**b - 1) ** -2 for b in range(_MOST, 1, -1))


@dataclass(frozen=True)
class Adaptive(Codec):
    """`bits` (1..8, a fraction too) an element on average, a bf16 pair a `group` in a sample."""

    bits: float = 2.0
    group: int = 256

    name: ClassVar[str] = "adaptive"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST:
            raise CodecError(f"{self}: bits must be 1..8")
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(*_rows(shape)))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if not self._has_kernel(x) or key is None:
            return False
        from fxcompress.kernels.triton import adaptive as gpu
        from fxcompress.kernels.triton import space

        x = x.view(_rows(x.shape))
        steps, minima, bits, planes = carve(payload, *self._sections(*x.shape))
        ends = torch.empty(2, len(steps), dtype=torch.int32, device=x.device)
        triton.run(gpu.ends(x, ends, self.group))
        groups = len(steps) // len(x)
        lowest, highest, finite = uniform.numbers(ends)
        bits.copy_(self._share_out(_widths(lowest, highest, finite).view(len(x), groups)))
        rates = torch.empty(len(steps), device=x.device)
        triton.run(space.grids(ends, steps, minima, rates, bits, groups))
        stops = bits.cumsum(0)
        triton.run(gpu.encode(x, planes, bits, stops, minima, rates, self.group, key, stream))
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if not self._has_kernel(x):
            return False
        from fxcompress.kernels.triton import adaptive as gpu

        x = x.view(_rows(x.shape))
        steps, minima, bits, planes = carve(payload, *self._sections(*x.shape))
        triton.run(gpu.decode(planes, bits, bits.cumsum(0), steps, minima, x, self.group))
        return True

    def _has_kernel(self, x: Tensor) -> bool:
        small = 0 < _rows(x.shape)[1] < 1 << 30  # offsets in a sample are 32 bits
        return small and x.numel() > 0 and triton.takes(x, self.group)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        if x.numel() == 0:
            return
        count, size = _rows(x.shape)
        x = x.view(count, size)
        scales, minima, bits, packed = carve(payload, *self._sections(count, size))
        bits.copy_(self._allocate(x))
        codes = torch.empty_like(x, dtype=torch.uint8)
        for part, values in self._groups(x):
            top = (1 << bits[part].int())[:, None] - 1
            lo, step = uniform.grid(values, top)
            hashes = rng.hash_range(part.start * size, (part.stop - part.start) * size, *keys)
            hashes = _grouped(hashes.view(-1, size), self.group)
            drawn = uniform.draw(values, lo[..., None], step[..., None], top[..., None], hashes)
            codes[part] = drawn.flatten(1)[:, :size]
            span = slice(part.start * values.shape[1], part.stop * values.shape[1])
            scales[span] = narrow(step, _BF16).view(-1)
            minima[span] = narrow(lo, _BF16).view(-1)
        owner, shift = self._owners(bits)
        rows = packed.view(len(owner), -1)
        for part in blocks.samples([len(owner), size], x.device):
            rows[part] = pack((codes[owner[part]] >> shift[part, None]) & 1, 1)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        if x.numel() == 0:
            return
        count, size = _rows(x.shape)
        x, limit = x.view(count, size), torch.finfo(x.dtype).max
        scales, minima, bits, packed = carve(payload, *self._sections(count, size))
        owner, shift = self._owners(bits)
        rows, codes = packed.view(len(owner), -1), packed.new_zeros(count, size)
        for part in blocks.samples([len(owner), size], x.device):
            codes.index_add_(0, owner[part], unpack(rows[part], 1, size) << shift[part, None])
        step, lo = scales.view(count, -1), minima.view(count, -1)
        for part in blocks.samples([count, size], x.device):
            s, m = (
                meta[part].float().repeat_interleave(self.group, 1)[:, :size] for meta in (step, lo)
            )
            x[part] = (m + codes[part].float() * s).clamp(-limit, limit)

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        variance = torch.zeros(x.shape, device=x.device)
        if x.numel():
            count, size = _rows(x.shape)
            x = x.detach().reshape(count, size)
            bits = self._allocate(x)
            for part, values in self._groups(x):
                lo, step = uniform.grid(values, (1 << bits[part].int())[:, None] - 1)
                noise = uniform.variance(values, lo[..., None], step[..., None])
                variance.view(count, size)[part] = noise.flatten(1)[:, :size]
        return ErrorModel(variance, torch.zeros_like(variance))

    def _sections(self, count: int, size: int) -> tuple[Section, ...]:
        grids = (_BF16, count * ((size + self.group - 1) // self.group))
        planes = (torch.uint8, self._total(count) * code_bytes(size, 1))
        return grids, grids, (torch.uint8, count), planes

    def _total(self, count: int) -> int:
        """The bits of all samples together."""
        mean = Fraction(self.bits).limit_denominator(10_000)
        return count * mean.numerator // mean.denominator

    def _groups(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Samples of x[count, size] and their groups, fp32[samples, groups, group]."""
        for part in blocks.samples(x.shape, x.device):
            yield part, _grouped(x[part].float(), self.group)

    def _allocate(self, x: Tensor) -> Tensor:
        """uint8[count]: the bits of each sample of x[count, size]."""
        pieces = [_widths(*uniform.extremes(values)) for _, values in self._groups(x)]
        return self._share_out(torch.cat(pieces))

    def _share_out(self, ranges: Tensor) -> Tensor:
        """uint8[count]: the bits of each sample, from the ranges of its groups."""
        relative = ranges / ranges.amax()  # 0/0 where the tensor is constant: counts 0
        squares = torch.where(ranges > 0, relative * 2.0**20, 0.0).to(torch.int64).square().sum(1)
        # One row a bit lost, highest bit and highest sample first: a stable sort keeps that order.
        costs = torch.stack([squares.flip(0).double() * cost for cost in _COSTS])
        order = costs.view(-1).argsort(stable=True)
        lost = torch.zeros_like(order, dtype=torch.uint8)
        count = len(ranges)
        lost.index_fill_(0, order[: _MOST * count - self._total(count)], 1)
        return _MOST - lost.view(costs.shape).sum(0, dtype=torch.uint8).flip(0)

    def _owners(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """(sample, bit as uint8) of each plane, int64[total]."""
        ends = bits.cumsum(0)
        plane = torch.arange(self._total(len(bits)), device=bits.device)
        owner = torch.searchsorted(ends, plane, right=True)
        return owner, (plane - ends[owner] + bits[owner]).to(torch.uint8)


def _widths(lowest: Tensor, highest: Tensor, finite: Tensor) -> Tensor:
    """The ranges of groups; 0 where there is none."""
    width = highest - lowest
    return torch.where(finite & width.isfinite(), width, 0.0)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, elements a sample); a vector is one sample."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _grouped(rows: Tensor, group: int) -> Tensor:
    """[count, size] -> [count, groups, group]: a short last group repeats its last element."""
    missing = -rows.shape[1] % group
    rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
    return rows.unflatten(1, (-1, group))
