"""subsample: one element of each few, drawn by the hash, at one bit. Unbiased, below a bit.

Of every k = 1/rate consecutive elements one is drawn, multiplied by k and coded by `rotate` at one
bit, 256 drawn ones a group; the decoder draws the same, so that no position is stored, and the
others decode to the mean of the group's span of 256*k elements. Subtracted first, it adds nothing
to the noise of sampling. With the formulas of `rotate` (n = 256 and, at the end, padded):

    mean   = of the span, to bf16; c = x - mean; zeros where the last block is short
    drawn  = c at offset (hash'(j)*k) >> 32 of block j; hash' has the two keys exchanged
    x'     = mean, plus k * rotated(drawn) at the offset; clamped to the finite range of dtype

A component that a smaller codec would drop is kept at random instead: its mean survives training.
A span with NaN or Inf is stored as scale = mean = NaN and decodes to NaN (any of them).

payload, bytes: those of rotate(bits=1) for ceil(numel/k) elements
error   = variance (k-1)*c^2 + |c|^2/n * D/(1-D), |c|^2 of the span; bias 0
          in all |c|^2 * ((1 + D/(1-D))/rate - 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress import rng
from fxcompress.codecs import rotate
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.groups import Groups
from fxcompress.codecs.levels import levels
from fxcompress.codecs.payload import carve, section_bytes
from fxcompress.codecs.planar import group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton

_GROUP = 256  # drawn elements
_RATES = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Subsample(Codec):
    """One bit for a share `rate` of the elements: 0.5, 0.25, 0.125 or 0.0625."""

    rate: float = 0.5

    name: ClassVar[str] = "subsample"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    decode_needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rate not in _RATES:
            raise CodecError(
                f"{self}: rate must be 0.5, 0.25, 0.125 or 0.0625; use rotate(bits=1) for 1"
            )

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(math.prod(shape)))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if key is not None and triton.takes(x, _GROUP * self.block):
            from fxcompress.kernels.triton import subsample as gpu

            parts = carve(payload, *self._sections(x.numel()))
            triton.run(gpu.encode(x, parts, levels(1), self.block, key, stream))
            return True
        if x.device.type != "cpu" or not cpu.available("subsample"):
            return False
        assert key is not None
        keys = rng.stream_key_ints(key, stream)
        cpu.subsample_encode(x, payload, levels(1).table, self.block, *keys)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if key is not None and triton.takes(x, _GROUP * self.block):
            from fxcompress.kernels.triton import subsample as gpu

            parts = carve(payload, *self._sections(x.numel()))
            triton.run(gpu.decode(parts, x, levels(1), self.block, key, stream))
            return True
        if x.device.type != "cpu" or not cpu.available("subsample"):
            return False
        assert key is not None
        keys = rng.stream_key_ints(key, stream)
        cpu.subsample_decode(payload, x, levels(1).table, self.block, *keys)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        k, d = self.block, levels(1).distortion
        flat = x.detach().reshape(-1)
        variance = torch.empty_like(flat, dtype=torch.float32)
        for start, rows, size in group_chunks(flat.numel(), _GROUP * k, flat.device):
            span = slice(start, start + rows * size)
            values = flat[span].view(rows, size).float()
            mean, unit = rotate.centre(values, True)[1:]
            energies = (values - mean.float()[:, None]).square()
            n = rotate.padded((size + k - 1) // k)
            noise = (k - 1) * energies + energies.sum(1, keepdim=True) * (d / (1 - d) / n)
            noise = torch.where(unit.isnan()[:, None], math.inf, noise)
            variance[span] = noise.view(-1)
        return ErrorModel(variance.view(x.shape), torch.zeros_like(variance).view(x.shape))

    def noise(self, seen: Groups) -> float:
        """As `Codec.noise`."""
        k, d = self.block, levels(1).distortion
        drawn = seen.joined(k)
        moved = drawn.mean - drawn.mean.to(torch.bfloat16).float()
        energy = drawn.energy + drawn.size * moved.square()
        weighed = drawn.second + 2 * moved * drawn.first + moved.square() * drawn.weight
        turned = drawn.weight * energy / replace(drawn, size=drawn.size / k).padded
        return float(((k - 1) * weighed + d / (1 - d) * turned).sum(dtype=torch.float64))

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, k = x.view(-1), self.block
        packed, scales, means = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), _GROUP * k, flat.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            c, mean, unit = rotate.centre(values, True)
            offsets = self._offsets(start, rows, size, keys)
            blocks = F.pad(c, (0, -size % k)).view(rows, -1, k)
            drawn = blocks.gather(2, offsets).squeeze(2)
            first, group = start // k, start // (_GROUP * k)
            codes, scale = rotate.quantise(drawn, unit, 1, True, k, first, group, keys)
            packed[first // 8 : (first + codes.numel()) // 8] = pack(codes, 1).view(-1)
            scales[group : group + rows] = scale
            means[group : group + rows] = torch.where(unit.isnan(), scale, mean)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, limit, k = x.view(-1), torch.finfo(x.dtype).max, self.block
        packed, scales, means = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), _GROUP * k, flat.device):
            offsets = self._offsets(start, rows, size, keys)
            drawn, first, group = offsets.shape[1], start // k, start // (_GROUP * k)
            n = rotate.padded(drawn)
            codes = unpack(packed[first // 8 : (first + rows * n) // 8].view(rows, -1), 1, n)
            values = rotate.dequantise(codes, scales[group : group + rows], 1, first, keys)
            mean = means[group : group + rows, None, None].float()
            blocks = mean.expand(rows, drawn, k).scatter(2, offsets, mean + values[:, :drawn, None])
            blocks = blocks.clamp(-limit, limit).view(rows, -1)[:, :size]
            flat[start : start + rows * size] = blocks.reshape(-1)

    @property
    def block(self) -> int:
        return round(1 / self.rate)

    def _sections(self, numel: int) -> list[tuple[torch.dtype, int]]:
        return rotate.sections((numel + self.block - 1) // self.block, 1, _GROUP, True)

    def _offsets(self, start: int, rows: int, size: int, keys: Keys) -> Tensor:
        """Which element of each block is drawn: int64[rows, blocks of a span, 1]."""
        k, blocks = self.block, (size + self.block - 1) // self.block
        hashes = rng.hash_range(start // k, rows * blocks, keys[1], keys[0])
        return (hashes * k >> 32).view(rows, blocks, 1)
