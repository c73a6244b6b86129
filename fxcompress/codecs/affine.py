"""affine: group-wise minimum and step, stochastic rounding. Unbiased.

ActNN (Chen et al., ICML 2021, section 3), but the metadata is rounded to bf16 *before* the codes
are drawn, so that rounding it adds no bias. For a group of consecutive elements, in fp32, with
L = 2^bits - 1 and integer rounding of the fp32 bits:

    lo   = min rounded down to bf16
    step = (max - lo) * fp32(1/L) rounded up to bf16, at least 2^-100; 0 where max == lo
    r    = 2^22 / step, one true division a group
    T    = min(trunc((x - lo) * r), L << 22)
    q    = min((T + (hash >> 10)) >> 22, L)          hash: 32 bits of rng.hash_range
    x'   = clamp(lo + q*step, finite range of dtype)

There is one float rounding each in (x - lo) and in its product, and q*step is exact (8 by 8 bits):
whether a compiler contracts to FMA changes no bit. A group with NaN or Inf, or whose grid
overflows fp32 (L*step), is stored as step = NaN (0x7fc0), lo = 0, q = 0 and decodes to NaN (any
of them); other groups do not notice. Minimum and maximum are taken in the total order, -0 < +0.

payload = codes (planar, padded to an even length) | step bf16[groups] | lo bf16[groups]
bytes   = even(ceil(n/8)*bits) + 4*ceil(n/group)
error   = step^2 * f*(1-f), f = frac((x - lo)/step); bias 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.planar import code_bytes, group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

_BF16 = torch.bfloat16
_MIN_STEP = 2.0**-100  # keeps r = 2^22/step finite


@dataclass(frozen=True)
class Affine(Codec):
    """`bits` (1..8) a code, one bf16 pair a `group` of elements (a multiple of 8)."""

    bits: int = 4
    group: int = 256

    name: ClassVar[str] = "affine"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"{self}: bits must be 1..8")
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        numel = math.prod(shape)
        return self._metadata_start(numel) + 4 * self._groups(numel)

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if x.device.type != "cpu" or not cpu.available():
            return False
        assert key is not None
        k_a, k_b = rng.stream_key_ints(key, stream)
        cpu.affine_encode(x, payload, self.bits, self.group, k_a, k_b)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if x.device.type != "cpu" or not cpu.available():
            return False
        cpu.affine_decode(payload, x, self.bits, self.group)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        flat = x.detach().reshape(-1)
        variance = torch.empty_like(flat, dtype=torch.float32)
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            span = slice(start, start + rows * size)
            values = flat[span].view(rows, size).float()
            lo, step = (meta[:, None] for meta in self._grid(values))
            f = ((values - lo) / step).frac()
            noise = torch.where(step == 0, 0.0, step.square() * f * (1 - f))
            variance[span] = torch.where(step.isnan(), math.inf, noise).view(-1)
        return ErrorModel(variance.view(x.shape), torch.zeros_like(variance).view(x.shape))

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, top = x.view(-1), (1 << self.bits) - 1
        scales, minima = self._metadata(payload, flat.numel())
        payload[code_bytes(flat.numel(), self.bits) : self._metadata_start(flat.numel())] = 0
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            lo, step = self._grid(values)
            regular = step > 0  # neither constant nor NaN
            r = torch.where(regular, 2.0**22 / step, 0.0)
            fixed = ((values - lo[:, None]) * r[:, None]).to(torch.int32).clamp(max=top << 22)
            noise = rng.hash_range(start, rows * size, *keys).view(rows, size) >> 10
            codes = ((fixed + noise) >> 22).clamp(max=top) * regular[:, None]
            packed = pack(codes.to(torch.uint8), self.bits).view(-1)
            at = code_bytes(start, self.bits)
            payload[at : at + packed.numel()] = packed
            group = start // self.group
            # Both are bf16 numbers already. By bits, since a cast may change which NaN it is.
            scales[group : group + rows] = (step.view(torch.int32) >> 16).short().view(_BF16)
            minima[group : group + rows] = (lo.view(torch.int32) >> 16).short().view(_BF16)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        flat, limit = x.view(-1), torch.finfo(x.dtype).max
        scales, minima = self._metadata(payload, flat.numel())
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            at = code_bytes(start, self.bits)
            packed = payload[at : at + rows * code_bytes(size, self.bits)].view(rows, -1)
            group = start // self.group
            step, lo = scales[group : group + rows, None], minima[group : group + rows, None]
            values = lo.float() + unpack(packed, self.bits, size).float() * step.float()
            flat[start : start + rows * size] = values.clamp(-limit, limit).view(-1)

    def _groups(self, numel: int) -> int:
        return (numel + self.group - 1) // self.group

    def _metadata_start(self, numel: int) -> int:
        return (code_bytes(numel, self.bits) + 1) // 2 * 2

    def _metadata(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Views of the payload's (steps, minima), each bf16[groups]."""
        pairs = payload[self._metadata_start(numel) :].view(_BF16)
        return pairs[: self._groups(numel)], pairs[self._groups(numel) :]

    def _grid(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(lo, step) of each row of fp32[rows, size], as fp32[rows] holding bf16 values."""
        top = (1 << self.bits) - 1
        # Float bits, with a negative's magnitude flipped, compare as int32 in the total order.
        # -NaN < -Inf < ... < Inf < NaN, so the two ends tell whether the group is finite.
        bits = values.view(torch.int32)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ends = torch.stack([order.amin(1), order.amax(1)])
        ends = ends ^ ((ends >> 31) & 0x7FFFFFFF)
        finite = (ends & 0x7FFFFFFF).amax(0) < 0x7F800000
        lowest, highest = ends[0], ends[1].view(torch.float32)
        down = (lowest + torch.where(lowest < 0, 0xFFFF, 0)).bitwise_and(-0x10000).to(torch.int32)
        lo = down.view(torch.float32)
        exact = ((highest - lo) * (1.0 / top)).clamp(min=_MIN_STEP)
        up = (exact.view(torch.int32) + 0xFFFF) & -0x10000
        step = torch.where(highest > lo, up.view(torch.float32), 0.0)
        finite &= (step * top).isfinite()
        return torch.where(finite, lo, 0.0), torch.where(finite, step, math.nan)
