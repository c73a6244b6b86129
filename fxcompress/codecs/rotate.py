"""rotate: random signs and Walsh-Hadamard, twice; levels of the normal; one scale a group.

A random rotation makes every group look normal, so that one table of levels suits all data; the
scale then makes it unbiased, or least in square (EDEN, Vargaftik et al., ICML 2022, arXiv
2108.08842, section 3). For a group of consecutive elements v, in fp32, but all sums are of
integers: exact, in any order. H is the Walsh-Hadamard matrix of 1 and -1, unnormalised.

    f      = 2^(127-E), E the exponent field of max |v|, kept in 1..253          so |v*f| < 4
    mean   = sum trunc(v*f * 2^16) / (2^16 * count) / f, rounded to bf16; or 0
    e      = 2^(127-E'), E' the exponent field of max |v*f - mean*f|
    C      = trunc((v*f - mean*f) * e * 2^16)                                    so |C| < 2^17
    w      = H(b H(a C)), signs a, b: 1 - 2*(bit i%32 of hash(i//32)), of hash(2^30 + i//32)
    s      = sqrt(n * sum ((C + 64) >> 7)^2) / 2^9, about the deviation of w * 2^-16
    T      = (trunc(w * (2^-2 / s)) + 8) >> 4, a unit normal in 2^-10
    q      = the level of T (codecs.levels); code = number of the level | (T < 0) << (bits-1)
    scale  = s * (sum T^2 / sum T*q) / (2^10 * n^2)   eden: <x' - mean, x - mean> = |x - mean|^2
             s * (sum T*q / sum q^2) / (2^10 * n^2)   lsq: the least |x' - x|
             over e*f, and rounded to bf16 up or down by hash(2^31 + group) >> 16, unbiased
    x'     = clamp(mean + a * (scale * H(b H q)), finite range of dtype)

Once is not enough: a group with one large element gave H(a C) = +-1 but for a little, next to a
threshold of the 2-bit levels, with a squared bias of 9 % of the group's energy; one with two such
elements 4 %. Twice, both are below what chance gives in 2000 draws (1e-5), the error is that of
normal data, and the second round costs some 0.2 ns an element and way.

A last group of t < `group` elements is padded with C = 0 to n, the next power of two from 32: with
8 elements the signs have too few values (squared bias 1e-2). A group with NaN or Inf is stored as
scale = NaN, mean = 0 and decodes to NaN (any of them); one of equal bf16 numbers is exact.

payload = codes (planar) | scale bf16[groups] | mean bf16[groups]
bytes   = (whole groups*group + n of the last)/8*bits + (4, without mean 2)*groups
error   = variance |x - mean|^2/n * D/(1-D), bias 0                 eden; D: `levels` distortion
          variance |x - mean|^2/n * D*(1-D), bias -D*(x - mean)     lsq
          that of many coordinates: up to 3 % less in groups of 128, 13 % in a last one of 32
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress import rng
from fxcompress.codecs.base import FLOATS, ErrorModel, Keys
from fxcompress.codecs.fused import GROUP, Fusing
from fxcompress.codecs.groups import SIZE, Groups
from fxcompress.codecs.levels import levels
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton
from fxcompress.kernels.prologue import Prologue

_BF16 = torch.bfloat16
_NAN = 0x7FC0  # of bf16
_SMALLEST = 32  # elements of a padded last group
_SECOND, _SCALES = 1 << 30, 1 << 31  # where the second signs' and the scales' hashes start


@dataclass(frozen=True)
class Rotate(Fusing):
    """`bits` (1..5) a code; a bf16 scale and, unless `mean` is none, mean a `group` of elements.

    scale: eden (unbiased) or lsq (least squares: less error, but every value is drawn to the mean).
    """

    bits: int = 2
    group: int = 256
    scale: str = "eden"
    mean: str = "group"

    name: ClassVar[str] = "rotate"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    decode_needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 5:
            raise CodecError(f"{self}: bits must be 1..5; above, affine and dither have less error")
        if self.group not in (128, 256, 512):
            raise CodecError(f"{self}: group must be 128, 256 or 512")
        if self.scale not in ("eden", "lsq"):
            raise CodecError(f"{self}: scale must be eden (unbiased) or lsq (least squares)")
        if self.mean not in ("group", "none"):
            raise CodecError(f"{self}: mean must be group (subtracted) or none")

    @property
    def unbiased(self) -> bool:
        """With the scale of EDEN; see the top of the file for how nearly."""
        return self.scale == "eden"

    @property
    def fuses(self) -> bool:
        """As `Codec.fuses`."""
        return self.group == GROUP

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(math.prod(shape)))

    def encode_kernel(
        self,
        x: Tensor,
        payload: Tensor,
        key: Tensor | None,
        stream: int,
        before: Prologue | None = None,
    ) -> bool:
        if key is not None and triton.takes(x, self.group):
            from fxcompress.kernels.triton import rotate as gpu

            parts, found = carve(payload, *self._sections(x.numel())), levels(self.bits)
            kind = (self.bits, self.group, self.scale == "eden")
            triton.run(gpu.encode(x, parts, found, *kind, key, stream, before))
            return True
        if x.device.type != "cpu" or not cpu.available("rotate"):
            return False
        assert key is not None
        k_a, k_b = rng.stream_key_ints(key, stream)
        table, kinds = levels(self.bits).table, (self.scale == "eden", self._centred)
        cpu.rotate_encode(x, payload, table, self.bits, self.group, *kinds, k_a, k_b, before)
        return True

    def decode_kernel(
        self,
        payload: Tensor,
        x: Tensor,
        key: Tensor | None,
        stream: int,
        mask: Tensor | None = None,
    ) -> bool:
        if key is not None and triton.takes(x, self.group):
            from fxcompress.kernels.triton import rotate as gpu

            parts, found = carve(payload, *self._sections(x.numel())), levels(self.bits)
            triton.run(gpu.decode(parts, x, found, self.bits, self.group, key, stream, mask))
            return True
        if x.device.type != "cpu" or not cpu.available("rotate"):
            return False
        assert key is not None
        k_a, k_b = rng.stream_key_ints(key, stream)
        how = (levels(self.bits).table, self.bits, self.group, self._centred)
        cpu.rotate_decode(payload, x, *how, k_a, k_b, mask)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        flat, d = x.detach().reshape(-1), levels(self.bits).distortion
        variance = torch.empty_like(flat, dtype=torch.float32)
        bias = torch.zeros_like(variance)
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            span = slice(start, start + rows * size)
            values = flat[span].view(rows, size).float()
            mean, unit = centre(values, self._centred)[1:]
            c = values - mean.float()[:, None]
            share = c.square().sum(1) / padded(size)
            noise = share * (d / (1 - d) if self.unbiased else d * (1 - d))
            noise = torch.where(unit.isnan(), math.inf, noise)
            variance[span] = noise.repeat_interleave(size)
            if not self.unbiased:
                bias[span] = torch.where(unit.isnan()[:, None], 0.0, c * -d).view(-1)
        return ErrorModel(variance.view(x.shape), bias.view(x.shape))

    def noise(self, seen: Groups) -> float | None:
        """As `Codec.noise`."""
        if self.group != SIZE or not self.unbiased:
            return None
        mean = seen.mean.to(_BF16).float() if self._centred else 0.0
        energy = seen.energy + seen.size * (seen.mean - mean).square()
        d = levels(self.bits).distortion
        return d / (1 - d) * float((seen.weight * energy / seen.padded).sum(dtype=torch.float64))

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat = x.view(-1)
        packed, scales, *means = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            c, mean, unit = centre(values, self._centred)
            group = start // self.group
            codes, scale = quantise(c, unit, self.bits, self.unbiased, 1, start, group, keys)
            at = start // 8 * self.bits
            packed[at : at + codes.numel() // 8 * self.bits] = pack(codes, self.bits).view(-1)
            scales[group : group + rows] = scale
            for section in means:
                section[group : group + rows] = mean

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, limit = x.view(-1), torch.finfo(x.dtype).max
        packed, scales, *means = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            n, at, group = padded(size), start // 8 * self.bits, start // self.group
            part = packed[at : at + rows * n // 8 * self.bits].view(rows, -1)
            codes = unpack(part, self.bits, n)
            values = dequantise(codes, scales[group : group + rows], self.bits, start, keys)
            for section in means:
                values = section[group : group + rows, None].float() + values
            values = values[:, :size].clamp(-limit, limit)
            flat[start : start + rows * size] = values.reshape(-1)

    @property
    def _centred(self) -> bool:
        return self.mean == "group"

    def _sections(self, numel: int) -> list[Section]:
        return sections(numel, self.bits, self.group, self._centred)


def sections(numel: int, bits: int, group: int, centred: bool) -> list[Section]:
    """Of a payload: codes, scales and, where centred, means."""
    whole, groups = numel // group, (numel + group - 1) // group
    codes, tail = whole * (group // 8), numel - whole * group
    edge, more = 0, _SMALLEST  # padded(tail), or 0: `more` for each `edge` that it exceeds
    while edge < group:
        codes = codes + (tail + group - 1 - edge) // group * (more // 8)
        edge += more
        more = edge
    metadata = [(_BF16, groups)] * (2 if centred else 1)
    return [(torch.uint8, codes * bits), *metadata]


# ---- groups: c int32[rows, n], codes uint8[rows, n] of consecutive elements from `start` on ----


def padded(size: int) -> int:
    """Elements that a group of `size` is coded as."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def centre(values: Tensor, subtract: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(v*f - mean*f, bf16 mean, 1/f) of fp32[rows, size]; 1/f NaN where a value is not finite."""
    field = _exponent(values)
    finite, field = field < 255, field.clamp(1, 253)
    values = torch.where(finite[:, None], values, 0.0)
    f, unit = _power(254 - field), _power(field)
    scaled = values * f[:, None]
    mean = torch.zeros_like(unit)
    if subtract:
        total = (scaled * 2.0**16).to(torch.int32).sum(1)
        mean = total.float() / (values.shape[1] * 2.0**16) * unit
    limit = torch.finfo(_BF16).max
    rounded = mean.clamp(-limit, limit).to(_BF16)
    c = scaled - (rounded.float() * f)[:, None]
    return c, rounded, torch.where(finite, unit, math.nan)


def quantise(
    c: Tensor, unit: Tensor, bits: int, eden: bool, gain: float, start: int, group: int, keys: Keys
) -> tuple[Tensor, Tensor]:
    """(codes, bf16 scale) of c and 1/f from `centre`; `group` numbers the first one.

    gain: a power of two that the decoded values are multiplied by.
    """
    table, field = levels(bits), _exponent(c)
    fixed = (c * _power(254 - field)[:, None] * 2.0**16).to(torch.int32)
    fixed = F.pad(fixed, (0, padded(c.shape[1]) - c.shape[1]))
    n = fixed.shape[1]
    energy = ((fixed + 64) >> 7).square().sum(1)
    s = (energy.float() * n).sqrt() * 2.0**-9
    regular = (energy > 0) & ~unit.isnan()
    first, second = _signs(fixed, start, keys)
    w = hadamard(hadamard(fixed * first) * second).float()
    r = torch.where(regular, 0.25 / s, 0.0)
    t = ((w * r[:, None]).to(torch.int32) + 8) >> 4
    size = t.abs()
    number, q = torch.zeros_like(t), torch.full_like(t, table.levels[0])
    for edge, low, high in zip(table.thresholds, table.levels, table.levels[1:], strict=False):
        number += size >= edge
        q += (size >= edge) * (high - low)
    codes = (number | (t < 0).int() << (bits - 1)) * regular[:, None]
    tq = (size * q).sum(1).float()
    ratio = t.square().sum(1).float() / tq if eden else tq / q.square().sum(1).float()
    exact = s * ratio * (gain / (1024.0 * n * n)) * _power(field) * unit
    exact = torch.where(regular | unit.isnan(), exact, 0.0)
    noise = rng.hash_range(_SCALES + group, c.shape[0], *keys) >> 16
    rounded = (exact.view(torch.int32) + noise * regular) >> 16
    scale = torch.where(unit.isnan(), _NAN, rounded).to(torch.int16).view(_BF16)
    return codes.to(torch.uint8), scale


def dequantise(codes: Tensor, scale: Tensor, bits: int, start: int, keys: Keys) -> Tensor:
    """fp32[rows, n] without their mean, from what `quantise` gave."""
    positive = levels(bits).levels
    values = codes.new_tensor([*positive, *(-level for level in positive)], dtype=torch.int32)
    q = values[codes.int()]
    first, second = _signs(q, start, keys)
    return (hadamard(hadamard(q) * second).float() * scale.float()[:, None]) * first


def hadamard(y: Tensor) -> Tensor:
    """Walsh-Hadamard transform of each row of int32[rows, n], unnormalised; n times its inverse."""
    rows, n = y.shape
    h = 1
    while h < n:
        a, b = y.view(rows, n // (2 * h), 2, h).unbind(2)
        y = torch.stack([a + b, a - b], 2).view(rows, n)
        h *= 2
    return y


def _signs(like: Tensor, start: int, keys: Keys) -> tuple[Tensor, Tensor]:
    """The first and the second signs of the elements from `start` on: int32 as `like`, 1 or -1."""
    found = []
    for offset in (0, _SECOND):
        words = rng.hash_range(offset + start // 32, like.numel() // 32, *keys)
        bits = (words[:, None] >> torch.arange(32, device=like.device)) & 1
        found.append((1 - 2 * bits).int().view(like.shape))
    return found[0], found[1]


def _exponent(values: Tensor) -> Tensor:
    """The largest exponent field of each row of fp32[rows, size]: 255 where one is NaN or Inf."""
    return (values.view(torch.int32) & 0x7FFFFFFF).amax(1) >> 23


def _power(field: Tensor) -> Tensor:
    """The fp32 with this exponent field: 2^(field - 127)."""
    return (field << 23).view(torch.float32)
