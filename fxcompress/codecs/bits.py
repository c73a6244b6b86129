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

from fxcompress.codecs.base import Codec, ErrorModel
from fxcompress.codecs.planar import code_bytes, group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

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

    def payload_bytes(self, numel: int) -> int:
        return code_bytes(numel, self.bits)

    def encode(self, x: Tensor, key: Tensor | None, stream: int) -> Tensor:
        self.check_encode(x, key)
        flat = x.detach().reshape(-1)
        payload = flat.new_empty(self.payload_bytes(flat.numel()), dtype=torch.uint8)
        if flat.device.type == "cpu" and cpu.available():
            cpu.bits_encode(flat, payload, self.bits, self.low)
        else:
            self.encode_reference(flat, payload)
        return payload

    def decode(
        self,
        payload: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        key: Tensor | None,
        stream: int,
    ) -> Tensor:
        self.check_decode(payload, math.prod(shape), dtype)
        payload = payload.contiguous()
        out = payload.new_empty(shape, dtype=dtype)
        if payload.device.type == "cpu" and cpu.available():
            cpu.bits_decode(payload, out, self.bits, self.low)
        else:
            self.decode_reference(payload, out.view(-1))
        return out

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        zero = torch.zeros_like(x, dtype=torch.float32)
        return ErrorModel(zero, zero)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """As `Codec.check_dtype`; booleans are 0 or 1, so their codes start at 0."""
        super().check_dtype(dtype)
        if dtype == torch.bool and self.low != 0:
            raise CodecError(f"{self} cannot hold booleans: use bits(bits=1,low=0)")

    def encode_reference(self, flat: Tensor, payload: Tensor) -> None:
        """Write the payload of a flat tensor with plain ATen ops: the definition."""
        for start, rows, size in group_chunks(flat.numel(), _GROUP, flat.device):
            values = flat[start : start + rows * size].view(rows, size).to(torch.int64)
            codes = (values - self.low) & ((1 << self.bits) - 1)
            packed = pack(codes.to(torch.uint8), self.bits).view(-1)
            at = code_bytes(start, self.bits)
            payload[at : at + packed.numel()] = packed

    def decode_reference(self, payload: Tensor, flat: Tensor) -> None:
        """Fill a flat tensor from its payload with plain ATen ops: the definition."""
        for start, rows, size in group_chunks(flat.numel(), _GROUP, flat.device):
            at = code_bytes(start, self.bits)
            packed = payload[at : at + rows * code_bytes(size, self.bits)].view(rows, -1)
            codes = unpack(packed, self.bits, size).to(torch.int64)
            flat[start : start + rows * size] = (codes + self.low).view(-1)
