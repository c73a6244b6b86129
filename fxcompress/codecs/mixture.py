"""mixture: sign and magnitude at one of two resolutions, drawn for each bucket. Unbiased.

"Mix-Precision Stochastic Quantization of Activations during Backpropagation" (thesis, Heidelberg,
2025), listings 5.1 (the quantizer, which magnitude.py has by itself) and 5.6 (the mixing). For a
bucket of consecutive elements and n levels, in fp32:

    S    = max|x| (norm=max) or |x|_2 (norm=l2) rounded up to bf16, at least 2^-96; 0 if all are
    r    = n*2^22 / S, one true division a bucket
    q    = (min(trunc(|x| * r), n << 22) + (hash >> 10)) >> 22
    x'   = clamp((+-q/n) * S, finite range of dtype), by the sign of x

    |x|_2 = M * (sqrt(sum trunc(|x|/M * 2^15)^2) * 2^-15), M = max|x|: the sum is of integers, so
            its order does not matter

The code is q + n for a positive and n - q for a negative x: 2n + 1 values, hence ceil(log2(2n+1))
bits. A bucket with NaN or Inf is stored as S = NaN and decodes to NaN. S saturates at the
largest bf16: only magnitudes above it (fp32's last 0.4 %) come back smaller.

Of the W whole buckets exactly k = round(prob*W), those with the smallest hashes, have n =
mix_levels, the others and a last, shorter bucket base_levels. The thesis draws each bucket
independently and never says where the outcome is kept; here a bucket's probability is k/W, the
payload's size does not depend on the draw, and the decoder draws it again from the key.

payload = S bf16[buckets] | codes of the k | codes of the W - k | codes of the last (planar)
bytes   = 2*ceil(n/bucket) + bucket/8*(k*mix bits + (W-k)*base bits) + ceil(last/8)*base bits
error   = mean over the draw of (S/n)^2 * f*(1-f), f = frac(|x|*n/S); bias 0
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
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import narrow, round_up
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import code_bytes, group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import triton

_BF16 = torch.bfloat16
_MIN_SCALE = 2.0**-96  # keeps r = n*2^22/S finite


@dataclass(frozen=True)
class Mixture(Codec):
    """`mix_levels` with probability `prob` a `bucket` (a multiple of 8), else `base_levels`.

    The thesis' presets of "2/4", "2/6" and "3/6" bits: levels 4 and 16 at .5, 4 and 64 at .3, 8
    and 64 at .4. Of "4/8", 16 and 256 at .2, the 513 values do not fit a byte: take 127.
    """

    base_levels: int = 4
    mix_levels: int = 16
    prob: float = 0.5
    bucket: int = 512
    norm: str = "max"

    name: ClassVar[str] = "mixture"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    decode_needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.base_levels <= 127 and 1 <= self.mix_levels <= 127):
            raise CodecError(f"{self}: levels must be 1..127 (a byte holds 255 signed values)")
        if not 0 <= self.prob <= 1:
            raise CodecError(f"{self}: prob must be 0..1")
        if self.bucket < 8 or self.bucket % 8:
            raise CodecError(f"{self}: bucket must be a multiple of 8, at least 8")
        if self.norm not in {"max", "l2"}:
            raise CodecError(f"{self}: norm must be max or l2")

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(math.prod(shape)))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if not triton.takes(x, self.bucket) or key is None:
            return False
        from fxcompress.kernels.triton import mixture as gpu

        scales, *codes = carve(payload, *self._sections(x.numel()))
        for section, buckets, numel, levels in self._runs_of(x, codes, key, stream):
            how = (levels, self.norm == "l2", self.bucket, key, stream)
            triton.run(gpu.encode(x, section, scales, buckets, numel, *how))
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if not triton.takes(x, self.bucket) or key is None:
            return False
        from fxcompress.kernels.triton import mixture as gpu

        scales, *codes = carve(payload, *self._sections(x.numel()))
        for section, buckets, numel, levels in self._runs_of(x, codes, key, stream):
            triton.run(gpu.decode((section, scales), buckets, x, numel, levels, self.bucket))
        return True

    def _runs_of(
        self, x: Tensor, codes: Sequence[Tensor], key: Tensor, stream: int
    ) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """(section of codes, buckets, elements, levels) of each resolution and of the last one."""
        from fxcompress.kernels.triton import mixture as gpu

        whole, wide = self._counts(x.numel())
        hashes = torch.empty(whole, dtype=torch.int64, device=x.device)
        triton.run(gpu.hashes(hashes, key, stream))
        last = hashes.new_full((1,), whole)
        counts = (wide, whole - wide, x.numel() % self.bucket)
        levels = (self.mix_levels, self.base_levels, self.base_levels)
        for i, buckets in enumerate((*self._ranked(hashes, wide), last)):
            numel = counts[i] if i == 2 else counts[i] * self.bucket
            yield codes[i], buckets, numel, levels[i]

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat = x.view(-1)
        scales, wide, rest, last = carve(payload, *self._sections(flat.numel()))
        chosen, others = self._choose(flat.numel(), keys)
        levels = self._levels(flat.numel(), chosen)
        codes = torch.empty_like(flat, dtype=torch.uint8)
        for start, rows, size in group_chunks(flat.numel(), self.bucket, flat.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            bucket = start // self.bucket
            n, scale = levels[bucket : bucket + rows, None], self._scale(values)
            regular = scale > 0  # neither zero nor NaN
            r = torch.where(regular, (n << 22) / scale, 0.0)
            fixed = (values.abs() * r).to(torch.int32).minimum(n << 22)
            noise = rng.hash_range(start, rows * size, *keys).view(rows, size) >> 10
            q = ((fixed + noise) >> 22) * regular
            signed = n + torch.where(values < 0, -q, q)
            codes[start : start + rows * size] = signed.to(torch.uint8).view(-1)
            scales[bucket : bucket + rows] = narrow(scale, _BF16).view(-1)
        tail = flat.numel() % self.bucket
        whole = codes[: flat.numel() - tail].view(-1, self.bucket)
        for section, index, bits in self._parts(wide, chosen, rest, others):
            section.copy_(pack(whole[index], bits).view(-1))
        last.copy_(pack(codes[None, flat.numel() - tail :], _bits(self.base_levels)).view(-1))

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, limit = x.view(-1), torch.finfo(x.dtype).max
        scales, wide, rest, last = carve(payload, *self._sections(flat.numel()))
        chosen, others = self._choose(flat.numel(), keys)
        levels = self._levels(flat.numel(), chosen)
        codes = torch.empty_like(flat, dtype=torch.uint8)
        tail = flat.numel() % self.bucket
        whole = codes[: flat.numel() - tail].view(-1, self.bucket)
        for section, index, bits in self._parts(wide, chosen, rest, others):
            packed = section.view(-1, code_bytes(self.bucket, bits))
            whole[index] = unpack(packed, bits, self.bucket)
        base = _bits(self.base_levels)
        codes[flat.numel() - tail :] = unpack(last[None], base, tail).view(-1)
        for start, rows, size in group_chunks(flat.numel(), self.bucket, flat.device):
            bucket = start // self.bucket
            n, scale = levels[bucket : bucket + rows, None], scales[bucket : bucket + rows, None]
            q = codes[start : start + rows * size].view(rows, size) - n
            values = q / n * scale.float()
            flat[start : start + rows * size] = values.clamp(-limit, limit).view(-1)

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        flat = x.detach().reshape(-1)
        variance = torch.empty_like(flat, dtype=torch.float32)
        whole, wide = self._counts(flat.numel())
        for start, rows, size in group_chunks(flat.numel(), self.bucket, flat.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            scale = self._scale(values)
            noise = torch.zeros_like(values)
            share = wide / whole if size == self.bucket else 0.0
            for n, weight in ((self.mix_levels, share), (self.base_levels, 1 - share)):
                f = (values.abs() / scale * n).clamp(max=n).frac()
                noise += weight * (scale / n).square() * f * (1 - f)
            noise = torch.where(scale == 0, 0.0, noise)
            noise = torch.where(scale.isnan(), math.inf, noise)
            variance[start : start + rows * size] = noise.view(-1)
        return ErrorModel(variance.view(x.shape), torch.zeros_like(variance).view(x.shape))

    def _counts(self, numel: int) -> tuple[int, int]:
        """(whole buckets, those of them at mix_levels)."""
        whole, prob = numel // self.bucket, Fraction(self.prob).limit_denominator(10_000)
        return whole, (2 * prob.numerator * whole + prob.denominator) // (2 * prob.denominator)

    def _sections(self, numel: int) -> tuple[Section, ...]:
        whole, wide = self._counts(numel)
        base, mix = _bits(self.base_levels), _bits(self.mix_levels)
        return (
            (_BF16, (numel + self.bucket - 1) // self.bucket),
            (torch.uint8, wide * (self.bucket // 8) * mix),
            (torch.uint8, (whole - wide) * (self.bucket // 8) * base),
            (torch.uint8, code_bytes(numel - whole * self.bucket, base)),
        )

    def _choose(self, numel: int, keys: Keys) -> tuple[Tensor, Tensor]:
        """The whole buckets at mix_levels and the others, each in ascending order."""
        whole, wide = self._counts(numel)
        k_a, k_b = (rng.mix(key ^ 0xC2B2AE35) for key in keys)  # apart from the elements' noise
        return self._ranked(rng.hash_range(0, whole, k_a, k_b), wide)

    @staticmethod
    def _ranked(hashes: Tensor, wide: int) -> tuple[Tensor, Tensor]:
        """The buckets of the `wide` smallest hashes and the others, each in ascending order."""
        order = hashes.argsort(stable=True)
        return order[:wide].sort().values, order[wide:].sort().values

    def _levels(self, numel: int, chosen: Tensor) -> Tensor:
        """int32[buckets]: n of each."""
        buckets = (numel + self.bucket - 1) // self.bucket
        levels = chosen.new_full((buckets,), self.base_levels, dtype=torch.int32)
        return levels.index_fill_(0, chosen, self.mix_levels)

    def _parts(
        self, wide: Tensor, chosen: Tensor, rest: Tensor, others: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield wide, chosen, _bits(self.mix_levels)
        yield rest, others, _bits(self.base_levels)

    def _scale(self, values: Tensor) -> Tensor:
        """S of each row of fp32[rows, size], as fp32[rows, 1] holding bf16 numbers."""
        highest = (values.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True)
        largest = highest.view(torch.float32)
        exact = largest
        if self.norm == "l2":
            parts = (values.abs() / largest * 2.0**15).to(torch.int64)
            exact = largest * (parts.square().sum(1, keepdim=True).float().sqrt() * 2.0**-15)
        up = round_up(exact.clamp(min=_MIN_SCALE), _BF16).clamp(max=torch.finfo(_BF16).max)
        scale = torch.where(largest > 0, up, 0.0)
        return torch.where(highest < 0x7F800000, scale, math.nan)


def _bits(levels: int) -> int:
    return (2 * levels).bit_length()
