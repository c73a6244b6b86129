"""bits: lossless packing of booleans and of integers in a known range.

q = (x - low) mod 2^bits, packed planar in groups of 256; x' = q + low
bytes = ceil(n/8)*bits, no metadata; error 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.codecs import pointwise
from fxcompress.codecs.base import Codec, ErrorModel, Keys
from fxcompress.codecs.planar import code_bytes, group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu, triton

_GROUP = 256


@dataclass(frozen=True)
class Bits(Codec):
    """Values in [low, low + 2^bits), 1..8 bits each. The range is the caller's promise:

    it is not checked (that would wait for the device), and a value outside wraps into it.
    """

    bits: int = 1
    low: int = 0

    name: ClassVar[str] = "bits"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
    lossless: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"{self}: bits must be 1..8")
        if not -(1 << 62) <= self.low <= 1 << 62:
            raise CodecError(f"{self}: low must be within 2^62")

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return code_bytes(math.prod(shape), self.bits)

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if triton.takes(x, _GROUP):
            from fxcompress.kernels.triton import bits as gpu

            triton.run(gpu.encode(x, payload, self.bits, self.low))
            return True
        if x.device.type != "cpu" or not cpu.available("bits"):
            return False
        cpu.bits_encode(x, payload, self.bits, self.low)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if triton.takes(x, _GROUP):
            from fxcompress.kernels.triton import bits as gpu

            triton.run(gpu.decode(payload, x, self.bits, self.low))
            return True
        if x.device.type != "cpu" or not cpu.available("bits"):
            return False
        cpu.bits_decode(payload, x, self.bits, self.low)
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        zero = torch.zeros_like(x, dtype=torch.float32)
        return ErrorModel(zero, zero)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """As `Codec.check_dtype`; booleans are 0 or 1, so their codes start at 0."""
        super().check_dtype(dtype)
        if dtype == torch.bool and self.low != 0:
            raise CodecError(f"{self} cannot hold booleans: use bits(bits=1)")

    @property
    def is_pointwise(self) -> bool:
        """As `Codec.is_pointwise`."""
        return True

    def pointwise(
        self, payload: Tensor, numel: int, dtype: torch.dtype, keys: Keys | None
    ) -> Tensor:
        index = pointwise.numbers(numel, payload.device)
        codes = pointwise.codes(payload, index, numel, self.bits, _GROUP)
        return codes != 0 if dtype == torch.bool else (codes.to(torch.int64) + self.low).to(dtype)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        flat = x.view(-1)
        for start, rows, size in group_chunks(flat.numel(), _GROUP, flat.device):
            values = flat[start : start + rows * size].view(rows, size).to(torch.int64)
            codes = (values - self.low) & ((1 << self.bits) - 1)
            packed = pack(codes.to(torch.uint8), self.bits).view(-1)
            at = code_bytes(start, self.bits)
            payload[at : at + packed.numel()] = packed

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        flat = x.view(-1)
        for start, rows, size in group_chunks(flat.numel(), _GROUP, flat.device):
            at = code_bytes(start, self.bits)
            packed = payload[at : at + rows * code_bytes(size, self.bits)].view(rows, -1)
            codes = unpack(packed, self.bits, size).to(torch.int64)
            flat[start : start + rows * size] = (codes + self.low).view(-1)
