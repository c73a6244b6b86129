"""cast: a shorter floating-point format. Unbiased with rounding=stochastic.

    format   exponent and mantissa bits  largest
    bf16     8, 7                        as fp32: no scale
    fp16     5, 10                       65504
    e4m3     4, 3                        448 (OCP 8-bit floating point, 2023: no Inf)
    e5m2     5, 2                        57344

Formats of less range than fp32 get one scale a group (or a tensor, group=0), which maps the largest
element to the largest number:

    S  = M / largest rounded up to bf16, at least 2^-126;  M = max|x|, fp32
    y  = x / S, within +-largest
    x' = clamp(rounded(y) * S, finite range of dtype)       an exact product: 11 by 8 bits at most

(A power of two would make y exact too, but leaves the error 4 % higher on normal data and 42 %
higher on heavy tails, e4m3, groups of 256: there the largest elements make most of the error, and
the very largest now has nearly none.) Rounding is to nearest even, or stochastic on the fp32 bits,
with d = 23 - mantissa bits and N the smallest normal number, below which spacing is even:

    z       = |y| + [|y| < N]*N
    rounded = ((bits(z) + (hash >> (32 - d))) with the low d bits cleared) - [|y| < N]*N

whose mean is |y|, but for bits of subnormal numbers below 2^-24*N. NaN and Inf come back as NaN,
each alone: M is taken over finite elements. Of bf16, fp32's last 0.4 % saturate.

payload = numbers format[n] | S bf16[groups]
bytes   = 2n (bf16), 2n + 2*ceil(n/group) (fp16), even(n) + 2*ceil(n/group) (fp8)
error   = nearest: bias x' - x, variance 0; stochastic: spacing^2 * f*(1-f), f the cleared bits/2^d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import pointwise
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import check_choice, fixed_error, narrow, round_up
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.sharing import Piece, Sharing, sharing
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton

_FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_BF16 = torch.bfloat16
_MANTISSA = {"bf16": 7, "fp16": 10, "e4m3": 3, "e5m2": 2}


@dataclass(frozen=True)
class Cast(Codec):
    """`format` bf16, fp16, e4m3 or e5m2, one scale a `group` (0: one for the tensor)."""

    format: str = "bf16"
    rounding: str = "nearest"
    group: int = 256

    name: ClassVar[str] = "cast"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        check_choice(self, "format", tuple(_FORMATS))
        check_choice(self, "rounding", ("nearest", "stochastic"))
        if self.group < 0:
            raise CodecError(f"{self}: group must be 0 (one scale for the tensor) or more")
        if not self._scaled and self.group != type(self).group:
            raise CodecError(f"{self}: bf16 has the range of fp32 and no scale: leave group out")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether `encode` draws random bits."""
        return self.rounding == "stochastic"

    @property
    def unbiased(self) -> bool:
        """As `Codec.unbiased`."""
        return self.stochastic

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(shape))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        used = key if self.stochastic else None
        if self.group % 8 == 0 and self.group and triton.takes(x, self.group):
            from fxcompress.kernels.triton import cast as gpu

            parts = carve(payload, *self._sections(x.shape))
            triton.run(gpu.encode(x, parts, self.group, used, stream))
            return True
        if not self.group or x.device.type != "cpu" or not cpu.available("cast"):
            return False
        keys = None if used is None else rng.stream_key_ints(used, stream)
        cpu.cast_encode(x, payload, self.format, self.group, keys)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if self.group % 8 == 0 and self.group and triton.takes(x, self.group):
            from fxcompress.kernels.triton import cast as gpu

            triton.run(gpu.decode(carve(payload, *self._sections(x.shape)), x, self.group))
            return True
        if not self.group or x.device.type != "cpu" or not cpu.available("cast"):
            return False
        cpu.cast_decode(payload, x, self.format, self.group)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        if not self.stochastic:
            return fixed_error(self, x)
        flat, shared = x.detach().reshape(-1), self._sharing(x.shape)
        variance = torch.zeros_like(flat, dtype=torch.float32)
        scales = self._scales(flat, shared)
        for piece in shared.pieces(flat.device):
            scale = piece.spread(scales)
            values = self._scaled_values(piece, flat, scale)
            bits = self._shifted(values)[0].view(torch.int32)
            below = (1 << self._dropped) - 1
            f = (bits & below) / (below + 1)
            above = bits.view(torch.float32) - (bits & ~below).view(torch.float32)  # f*spacing
            noise = torch.where(f == 0, 0.0, (above * scale).square() * (1 - f) / f)
            variance[piece.span] = piece.unfold(torch.where(values.isnan(), math.inf, noise))
        return ErrorModel(variance.view(x.shape), torch.zeros_like(variance).view(x.shape))

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        flat, shared = x.view(-1), self._sharing(x.shape)
        numbers, *kept = carve(payload, *self._sections(x.shape))
        scales = self._scales(flat, shared)
        for piece in shared.pieces(flat.device):
            values = self._scaled_values(piece, flat, piece.spread(scales))
            if self.stochastic:
                assert keys is not None
                values = self._rounded(values, piece, keys)
            numbers[piece.span] = narrow(piece.unfold(values), numbers.dtype)
        if kept:
            kept[0].copy_(scales.view(-1))

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        flat, shared, limit = x.view(-1), self._sharing(x.shape), torch.finfo(x.dtype).max
        numbers, *kept = carve(payload, *self._sections(x.shape))
        scales = kept[0].float()[None] if kept else torch.ones(1, shared.count, device=x.device)
        for piece in shared.pieces(flat.device):
            values = piece.fold(numbers[piece.span].float()) * piece.spread(scales)
            flat[piece.span] = piece.unfold(values.clamp(-limit, limit))

    @property
    def is_pointwise(self) -> bool:
        """As `Codec.is_pointwise`: bf16, which has no scale."""
        return self.format == "bf16"

    def pointwise(
        self, payload: Tensor, numel: int, dtype: torch.dtype, keys: Keys | None
    ) -> Tensor:
        limit = torch.finfo(dtype).max
        values = pointwise.bf16(payload, 0, pointwise.numbers(numel, payload.device))
        return values.clamp(-limit, limit).to(dtype)

    @property
    def _scaled(self) -> bool:
        return self.format != "bf16"

    @property
    def _largest(self) -> float:
        return torch.finfo(_FORMATS[self.format]).max

    @property
    def _dropped(self) -> int:
        return 23 - _MANTISSA[self.format]

    def _sharing(self, shape: Sequence[int]) -> Sharing:
        per = "group" if self.group and self._scaled else "tensor"
        return sharing(per, shape, self.group)

    def _sections(self, shape: Sequence[int]) -> list[Section]:
        numbers = (_FORMATS[self.format], math.prod(shape))
        scales: list[Section] = [(_BF16, self._sharing(shape).count)] if self._scaled else []
        return [numbers, *scales]

    def _scales(self, x: Tensor, shared: Sharing) -> Tensor:
        """S of each scale, fp32[1, scales]; ones where there is none."""
        largest = torch.zeros(1, shared.scales, device=x.device)
        if not self._scaled:
            return largest + 1
        for piece in shared.pieces(x.device):
            found = _finite(piece.fold(x[piece.span])).abs().nan_to_num(nan=0.0).amax((1, 3))
            largest[piece.scales] = torch.maximum(largest[piece.scales], found)
        return round_up((largest / self._largest).clamp(min=2.0**-126), _BF16)

    def _scaled_values(self, piece: Piece, flat: Tensor, scale: Tensor) -> Tensor:
        values = _finite(piece.fold(flat[piece.span]))
        return (values / scale).clamp_(-self._largest, self._largest) if self._scaled else values

    def _shifted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(z, what was added to |y|): z's numbers of the format are evenly spaced fp32 bits."""
        magnitude = values.abs()
        # [|y| < N]*N by integers: on CPU a mask of booleans takes twice as long.
        smallest = (math.frexp(torch.finfo(_FORMATS[self.format]).tiny)[1] + 126) << 23
        below = (magnitude.view(torch.int32) - smallest) >> 31
        shift = (below & smallest).view(torch.float32)
        return magnitude + shift, shift

    def _rounded(self, values: Tensor, piece: Piece, keys: Keys) -> Tensor:
        start, count = piece.span.start, piece.span.stop - piece.span.start
        noise = (rng.hash_range(start, count, *keys) >> (32 - self._dropped)).to(torch.int32)
        shifted, shift = self._shifted(values)
        bits = (shifted.view(torch.int32) + piece.fold(noise)) & (-1 << self._dropped)
        sign = values.view(torch.int32) & -0x80000000
        rounded = ((bits.view(torch.float32) - shift).view(torch.int32) | sign).view(torch.float32)
        return torch.where(values.isnan(), math.nan, rounded)  # noise may carry a NaN over to -0


def _finite(values: Tensor) -> Tensor:
    """fp32, Inf as NaN (and -0 as it is)."""
    values = values.float()
    return values - (values - values)
