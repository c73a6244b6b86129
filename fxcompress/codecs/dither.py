"""dither: the grid and the codes of `affine`, decoded with the very noise that drew them. Unbiased.

Subtractive dither (Roberts, IRE Trans. IT 8(2), 1962; Schuchman, IEEE Trans. COM 12(4), 1964).
Affine's code is q = floor(t + u), t = (x - lo)/step, u uniform in [0, 1): t + u lies anywhere in
its cell, so q - u + 1/2 is off t by something uniform in +-1/2 whatever t is. No code clips, as
t <= 2^bits - 1. In fp32, u from the hash that affine adds, its upper 15 bits:

    d  = 2^15 - 1 - 2*(hash >> 17)                      (1/2 - u) * 2^16, |d| < 2^15
    x' = clamp((lo + q*step) + d*(step * 2^-16), finite range of dtype)

Both products are exact (8 by 8 and 15 by 8 bits): FMA changes no bit. Noise of step^2/12 everywhere
is half of affine's worst (step^2/4) and, where values spread over cells, half of its mean. But
affine's is 0 on the grid itself: where most values are the group's minimum, as after a ReLU, affine
keeps them exactly and has less error; from 50 % of zeros on, take affine or rotate.

payload, bytes: those of affine
error   = step^2/12; bias 0
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
from fxcompress.codecs.affine import Affine
from fxcompress.codecs.base import FLOATS, ErrorModel, Keys
from fxcompress.codecs.fused import GROUP, Fusing
from fxcompress.codecs.groups import SIZE, Groups
from fxcompress.codecs.payload import carve
from fxcompress.codecs.planar import code_bytes, group_chunks, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton
from fxcompress.kernels.prologue import Prologue


@dataclass(frozen=True)
class Dither(Fusing):
    """`bits` (1..8) a code, one bf16 pair a `group` of elements (a multiple of 8)."""

    bits: int = 4
    group: int = 256

    name: ClassVar[str] = "dither"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    decode_needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"{self}: bits must be 1..8")
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")

    @property
    def fuses(self) -> bool:
        """As `Codec.fuses`."""
        return self.group == GROUP

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return self._affine.payload_bytes(shape, dtype)

    def encode_kernel(
        self,
        x: Tensor,
        payload: Tensor,
        key: Tensor | None,
        stream: int,
        before: Prologue | None = None,
    ) -> bool:
        return self._affine.encode_kernel(x, payload, key, stream, before)

    def decode_kernel(
        self,
        payload: Tensor,
        x: Tensor,
        key: Tensor | None,
        stream: int,
        mask: Tensor | None = None,
    ) -> bool:
        if key is not None and triton.takes(x, self.group):
            from fxcompress.kernels.triton import dither as gpu

            sections = self._carve(payload, x.numel())
            triton.run(gpu.decode(sections, x, self.bits, self.group, key, stream, mask))
            return True
        if x.device.type != "cpu" or not cpu.available("dither"):
            return False
        assert key is not None
        k_a, k_b = rng.stream_key_ints(key, stream)
        cpu.dither_decode(payload, x, self.bits, self.group, k_a, k_b, mask)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        # The grid does not depend on the key.
        payload = self.encode(x, torch.zeros(2, dtype=torch.int64, device=x.device), 0)
        _, steps, _ = self._carve(payload, x.numel())
        noise = steps.float().square() / 12
        noise = torch.where(noise.isnan(), math.inf, noise).repeat_interleave(self.group)
        variance = noise[: x.numel()].view(x.shape)
        return ErrorModel(variance, torch.zeros_like(variance))

    def noise(self, seen: Groups) -> float | None:
        """As `Codec.noise`."""
        if self.group != SIZE:
            return None
        steps = self._affine.steps(seen.low, seen.high)
        return float((seen.weight * steps.square()).sum(dtype=torch.float64)) / 12

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        self._affine.encode_reference(x, payload, keys)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        assert keys is not None
        flat, limit = x.view(-1), torch.finfo(x.dtype).max
        packed, steps, minima = self._carve(payload, flat.numel())
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            at, group = code_bytes(start, self.bits), start // self.group
            part = packed[at : at + rows * code_bytes(size, self.bits)].view(rows, -1)
            step = steps[group : group + rows, None].float()
            values = minima[group : group + rows, None].float()
            values = values + unpack(part, self.bits, size).float() * step
            noise = rng.hash_range(start, rows * size, *keys).view(rows, size) >> 17
            values = values + (0x7FFF - 2 * noise).float() * (step * 2.0**-16)
            flat[start : start + rows * size] = values.clamp(-limit, limit).view(-1)

    @property
    def is_pointwise(self) -> bool:
        """As `Codec.is_pointwise`."""
        return True

    def pointwise(
        self, payload: Tensor, numel: int, dtype: torch.dtype, keys: Keys | None
    ) -> Tensor:
        assert keys is not None
        index, limit = pointwise.numbers(numel, payload.device), torch.finfo(dtype).max
        q = pointwise.codes(payload, index, numel, self.bits, self.group)
        steps, minima = pointwise.after_codes(numel, self.bits, self.group)
        step = pointwise.bf16(payload, steps, index // self.group)
        values = pointwise.bf16(payload, minima, index // self.group) + q.float() * step
        noise = rng.hash_range(0, numel, *keys) >> 17
        values = values + (0x7FFF - 2 * noise).float() * (step * 2.0**-16)
        return values.clamp(-limit, limit).to(dtype)

    @property
    def _affine(self) -> Affine:
        return Affine(self.bits, self.group)

    def _carve(self, payload: Tensor, numel: int) -> list[Tensor]:
        """The payload's (codes, steps, minima)."""
        groups = (torch.bfloat16, (numel + self.group - 1) // self.group)
        return carve(payload, (torch.uint8, code_bytes(numel, self.bits)), groups, groups)
