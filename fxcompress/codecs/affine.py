"""affine: codes on a uniform grid that follows the values. The default is unbiased.

The default is ActNN (Chen et al., ICML 2021, section 3), but its metadata are rounded to bf16
*before* the codes are drawn, so that rounding them adds no bias. For a group of consecutive
elements, in fp32, with L = 2^bits - 1 and integer rounding of the fp32 bits:

    lo   = min rounded down to bf16
    step = (max - lo) * fp32(1/L) rounded up to bf16, at least 2^-100; 0 where max == lo
    r    = 2^22 / step, one true division a group
    T    = min(trunc((x - lo) * r), L << 22)
    q    = (T + (hash >> 10)) >> 22                  hash: 32 bits of rng.hash_range
    x'   = clamp(lo + q*step, finite range of dtype)

There is one float rounding each in (x - lo) and in its product, and q*step is exact (8 by 8 bits):
whether a compiler contracts to FMA changes no bit. A group with NaN or Inf, or whose grid
overflows fp32 (L*step), is stored as step = NaN (0x7fc0), lo = 0, q = 0 and decodes to NaN (any
of them); other groups do not notice. Minimum and maximum are taken in the total order, -0 < +0.

Variants, by field (grid.py has their common formula):

    rounding  nearest: q = (T + 2^21) >> 22. Biased, without noise.
    zero      integer: "Mix-Precision Stochastic Quantization of Activations during
              Backpropagation" (Heidelberg, 2025), p. 30:
                  step = max((max - min)/L, max|x|/32767), z = rint(-min/step)
                  x'   = (q - z)*step, q = round(x/step + z) clipped to 0 .. L
              Zero comes back exact. Rounding z shifts the grid by up to half a step, so that one
              end clips: biased there. The thesis leaves z unbounded; the second term keeps it in
              16 bits, at the cost of a coarser step where |x| > 128*range (8 bits).
              symmetric: the same with z = 2^(bits-1) for all.
    scale     of symmetric; max: step = max|x| / (2^(bits-1) - 1), nothing clips, unbiased.
              percentile: step = P/2^(bits-1), P the k-th smallest |x|, k = floor(percentile/100*n
              + 1/2): with per=tensor and rounding=nearest the default of Brevitas
              (IntQuant with a runtime percentile), the thesis' deterministic baseline. Positive
              values above P*(1 - 2^(1-bits)) clip; at 1 bit all of them do.
    per       what shares a grid (sharing.py); `group` is still how codes are packed
    meta      dtype of step and lo; fp16 loses groups whose grid exceeds 65504, and of an fp32 step
              above a minimum 16 bits are kept (q*step stays exact)

payload = codes (planar) | step meta[scales] | minimum: lo meta[scales]; integer: z int16[scales]
bytes   = even(ceil(n/8)*bits) + 4*ceil(n/group) by default
error   = stochastic: step^2 * f*(1-f), f = frac(T), and where codes clip, by how much, as bias;
          nearest: its actual error, as bias
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
from fxcompress.codecs import pointwise
from fxcompress.codecs.base import FLOATS, ErrorModel, Keys
from fxcompress.codecs.fused import GROUP, Fusing
from fxcompress.codecs.grid import META, MIN_STEP, Grid
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import code_bytes
from fxcompress.codecs.sharing import PER, Sharing, sharing
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton
from fxcompress.kernels.prologue import Prologue

_SCALES = {"minimum": ("range",), "integer": ("range",), "symmetric": ("max", "percentile")}
_MOST_ZERO = 32767


@dataclass(frozen=True)
class Affine(Fusing):
    """`bits` (1..8) a code, one grid a `group` of elements (a multiple of 8), or as `per` says."""

    bits: int = 4
    group: int = 256
    rounding: str = "stochastic"
    zero: str = "minimum"
    scale: str = "range"
    per: str = "group"
    channels: int = 1
    meta: str = "bf16"
    percentile: float = 99.999

    name: ClassVar[str] = "affine"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"{self}: bits must be 1..8")
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")
        grids.check_choice(self, "rounding", ("stochastic", "nearest"))
        grids.check_choice(self, "zero", tuple(_SCALES))
        grids.check_choice(self, "per", PER)
        grids.check_choice(self, "meta", tuple(META))
        if self.scale == "l2":
            raise CodecError(f"{self}: use magnitude(norm=l2), whose levels follow |x|/norm")
        if self.scale not in _SCALES[self.zero]:
            fitting = " or ".join(f"scale={scale}" for scale in _SCALES[self.zero])
            raise CodecError(f"{self}: zero={self.zero} goes with {fitting}")
        if self.scale == "max" and self.bits == 1:
            raise CodecError(f"{self}: no symmetric grid has two values; use sign or bits=2")
        if not 0 < self.percentile <= 100:
            raise CodecError(f"{self}: percentile must be above 0, at most 100")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether `encode` draws random bits."""
        return self.rounding == "stochastic"

    @property
    def unbiased(self) -> bool:
        """As `Codec.unbiased`: stochastic, and nothing clips."""
        return self.stochastic and (self.zero == "minimum" or self.scale == "max")

    @property
    def fuses(self) -> bool:
        """As `Codec.fuses`."""
        return self._has_kernels and self.stochastic and self.group == GROUP

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(shape))

    def encode_kernel(
        self,
        x: Tensor,
        payload: Tensor,
        key: Tensor | None,
        stream: int,
        before: Prologue | None = None,
    ) -> bool:
        if self._has_kernels and triton.takes(x, self.group):
            from fxcompress.kernels.triton import affine as gpu

            sections = self.carve(payload, x.shape)
            drawn_by = key if self.stochastic else None
            triton.run(gpu.encode(x, sections, self.bits, self.group, drawn_by, stream, before))
            return True
        if (
            not (self._has_kernels and self.stochastic)
            or x.device.type != "cpu"
            or not cpu.available("affine")
        ):
            return False
        assert key is not None
        k_a, k_b = rng.stream_key_ints(key, stream)
        cpu.affine_encode(x, payload, self.bits, self.group, k_a, k_b, before)
        return True

    def decode_kernel(
        self,
        payload: Tensor,
        x: Tensor,
        key: Tensor | None,
        stream: int,
        mask: Tensor | None = None,
    ) -> bool:
        if self._has_kernels and triton.takes(x, self.group):
            from fxcompress.kernels.triton import affine as gpu

            sections = self.carve(payload, x.shape)
            triton.run(gpu.decode(sections, x, self.bits, self.group, mask))
            return True
        if not self._has_kernels or x.device.type != "cpu" or not cpu.available("affine"):
            return False
        cpu.affine_decode(payload, x, self.bits, self.group, mask)
        return True

    def carve(self, payload: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """The payload's sections: codes, steps and, by `zero`, minima or zero points."""
        return carve(payload, *self._sections(shape))

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        if not self.stochastic:
            return grids.fixed_error(self, x)
        shared = self._sharing(x.shape)
        grid = self._grid(x.detach().reshape(-1), shared)
        return grids.stochastic_error(x, shared, grid, self.unbiased)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        flat, shared = x.view(-1), self._sharing(x.shape)
        codes, steps, *origins = carve(payload, *self._sections(x.shape))
        grid = self._grid(flat, shared)
        grids.encode(flat, codes, self.group, shared, grid, keys if self.stochastic else None)
        steps.copy_(grids.narrow(grid.step, steps.dtype).view(-1))
        if self.zero == "minimum":
            origins[0].copy_(grid.lo.view(-1))  # type: ignore[union-attr]
        if self.zero == "integer":
            origins[0].copy_(grid.zero.view(-1))  # type: ignore[union-attr]

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        shared = self._sharing(x.shape)
        codes, steps, *origins = carve(payload, *self._sections(x.shape))
        step, *rest = (s.float().view(shared.outer, shared.scales) for s in (steps, *origins))
        lo = rest[0] if self.zero == "minimum" else 0.0
        zero = rest[0] if self.zero == "integer" else self._fixed_zero
        grid = Grid(step, lo, zero, self._top)
        grids.decode(codes, x.view(-1), self.group, shared, grid)

    @property
    def is_pointwise(self) -> bool:
        """As `Codec.is_pointwise`: where step and minimum are bf16, one a group."""
        return self._has_kernels

    def pointwise(
        self, payload: Tensor, numel: int, dtype: torch.dtype, keys: Keys | None
    ) -> Tensor:
        index, limit = pointwise.numbers(numel, payload.device), torch.finfo(dtype).max
        q = pointwise.codes(payload, index, numel, self.bits, self.group)
        steps, minima = pointwise.after_codes(numel, self.bits, self.group)
        step = pointwise.bf16(payload, steps, index // self.group)
        lo = pointwise.bf16(payload, minima, index // self.group)
        return (lo + q.float() * step).clamp(-limit, limit).to(dtype)

    @property
    def _has_kernels(self) -> bool:
        return (self.zero, self.per, self.meta) == ("minimum", "group", "bf16")

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _fixed_zero(self) -> int:
        return 1 << (self.bits - 1) if self.zero == "symmetric" else 0

    def _sharing(self, shape: Sequence[int]) -> Sharing:
        return sharing(self.per, shape, self.group, self.channels)

    def _sections(self, shape: Sequence[int]) -> list[Section]:
        count, meta = self._sharing(shape).count, META[self.meta]
        found = [(torch.uint8, code_bytes(math.prod(shape), self.bits)), (meta, count)]
        if self.zero != "symmetric":
            found.append((meta if self.zero == "minimum" else torch.int16, count))
        return found

    def _grid(self, x: Tensor, shared: Sharing) -> Grid:
        lowest, highest = grids.ends(x, shared)
        finite = lowest.isfinite() & highest.isfinite()
        largest = torch.maximum(lowest.abs(), highest.abs())
        lo: Tensor | float = 0.0
        zero: Tensor | int = self._fixed_zero
        if self.zero == "minimum":
            lo, step = self._between(lowest, highest)
            finite &= lo.isfinite() & (step * self._top).isfinite()
            lo = torch.where(finite, lo, 0.0)
        elif self.zero == "integer":
            spread = (highest - lowest) * (1.0 / self._top)
            step = self._step(torch.maximum(spread, largest * (1.0 / _MOST_ZERO)))
            finite &= step.isfinite()
            zero = torch.where(finite, (-lowest / step).round(), 0.0)
        elif self.scale == "max":
            step = self._step(largest * (1.0 / (self._fixed_zero - 1)))
        else:
            step = self._step(self._percentile(x, shared) * (1.0 / self._fixed_zero))
        step = torch.where(finite & step.isfinite(), step, math.nan)
        return Grid(step, lo, zero, self._top)

    def steps(self, lowest: Tensor, highest: Tensor) -> Tensor:
        """Of grids from the lowest value to the highest."""
        return self._between(lowest, highest)[1]

    def _between(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        lo = grids.round_down(lowest, META[self.meta])
        step = grids.shorten(self._step((highest - lo) * (1.0 / self._top)))
        return lo, torch.where(highest > lo, step, 0.0)

    def _step(self, exact: Tensor) -> Tensor:
        return grids.round_up(exact.clamp(min=MIN_STEP), META[self.meta])

    def _percentile(self, x: Tensor, shared: Sharing) -> Tensor:
        """The percentile of |x| of each scale, a value of x: fp32[outer, scales]."""
        if not x.numel():
            return x.new_zeros(shared.outer, shared.scales, dtype=torch.float32)
        found = []
        for rows in shared.rows(x):
            size = rows.shape[2]
            k = min(max(math.floor(0.01 * self.percentile * size + 0.5), 1), size)
            # The k-th smallest is the least of the largest: at 99.999 % those are few.
            found.append(rows.abs().topk(size - k + 1, 2, sorted=False).values.amin(2).float())
        return torch.cat(found, 1)
